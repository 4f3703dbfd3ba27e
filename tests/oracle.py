"""Standard attention in the inputs' own dtype, by autograd, from the definition alone; tests give it float64."""

from __future__ import annotations

import torch
from torch import Tensor


def standard(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    seen: Tensor | None = None,
    softcap: float = 0.0,
    added: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of (batch, seqlen, heads, head_dim); seen and added broadcast to (batch, heads, q_len, k_len)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores if added is None else scores + added
    scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    # One more column for the sink: hidden where there is none, it also stands in where a row has no key at all.
    sink = scores.new_full((1, 1, 1, 1), -torch.inf) if sinks is None else sinks[None, :, None, None]
    scores = torch.cat([scores, sink.expand(*scores.shape[:3], 1)], -1)
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    lse = torch.logsumexp(scores.masked_fill(blind, 0.0), -1).masked_fill(blind[..., 0], -torch.inf)
    weights = torch.softmax(scores.masked_fill(blind, 0.0), -1).masked_fill(blind, 0.0)[..., :-1]
    return (weights @ v).transpose(1, 2), lse


def band(q_len: int, k_len: int, left: int | None = None, right: int | None = None) -> Tensor:
    """The keys, (q_len, k_len), that a window lets each row see; the last row stands at the last key."""
    distance = torch.arange(k_len) - (torch.arange(q_len)[:, None] + k_len - q_len)
    seen = torch.ones(q_len, k_len, dtype=torch.bool)
    seen = seen if left is None else seen & (distance >= -left)
    return seen if right is None else seen & (distance <= right)


def alibi(slopes: Tensor, q_len: int, k_len: int) -> Tensor:
    """The ALiBi term, (1 or batch, heads, q_len, k_len), of slopes (heads,) or (batch, heads)."""
    distance = torch.arange(k_len) - (torch.arange(q_len)[:, None] + k_len - q_len)
    return -slopes.reshape(-1, slopes.shape[-1], 1, 1) * distance.abs()


def gradients(results: tuple[Tensor, ...], leaves: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    """Gradients of the leaves; zeros where a leaf takes no part."""
    return list(torch.autograd.grad(results, leaves, upstream, materialize_grads=True))


def close(results: object, expected: object) -> None:
    """Equality up to float64's rounding, or float32's where that is the coarser dtype's."""
    torch.testing.assert_close(results, expected, rtol=1e-9, atol=1e-10)
