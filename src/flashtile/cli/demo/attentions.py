"""The three attentions that the demo compares: one causal function of (batch, seqlen, heads, head_dim) tensors each."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import flashtile

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def standard(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as a textbook writes it: all scores at once. The scale goes to q, which saves one more score matrix."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # [batch, heads, seqlen, seqlen]
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(later, -math.inf).softmax(-1)
    return (weights @ v).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own choice among its kernels."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def tiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """This package, with the backend that it chooses by itself."""
    out = flashtile.attention(q, k, v, causal=True)
    assert isinstance(out, Tensor)
    return out


ATTENTIONS: dict[str, Attention] = {"standard": standard, "sdpa": sdpa, "flashtile": tiled}
TITLES = {"standard": "standard attention", "sdpa": "PyTorch SDPA", "flashtile": "flashtile"}
