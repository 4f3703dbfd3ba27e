"""Rotary position embedding (Su et al. 2021, "RoFormer", section 3.4.2): pairs of a head's elements turned by angles.

A pair (a, b) at an angle t becomes (a cos t - b sin t, a sin t + b cos t). The pairs are the two halves of the rotated
elements, or, interleaved, neighbours. Computed in float32 (float64 for float64 inputs) and rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, inverse: bool = False, out: Tensor | None = None
) -> Tensor:
    """x turned by the angles that cos and sin tell.

    Args:
        x: (..., seqlen, heads, head_dim).
        cos, sin: (..., seqlen, rotated / 2), broadcastable to x without its heads; rotated <= head_dim. The elements
            of x behind the first `rotated` stay.
        interleaved: pairs are (0, 1), (2, 3) ... (GPT-J) instead of (0, rotated / 2), (1, rotated / 2 + 1) ...
        inverse: turn back; also the gradient's way.
        out: written and returned, may be x itself; default: new memory.
    """
    half = cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)  # [..., seqlen, 1, rotated / 2]
    sin = -sin if inverse else sin
    a, b = (part.to(wide) for part in _pairs(x, half, interleaved))
    turned = a * cos - b * sin, a * sin + b * cos
    if out is None:
        out = torch.empty_like(x)
    if out is not x:
        out[..., 2 * half :] = x[..., 2 * half :]
    for place, values in zip(_pairs(out, half, interleaved), turned, strict=True):
        place.copy_(values)
    return out


def _pairs(x: Tensor, half: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and of the second elements of all pairs."""
    if interleaved:
        return x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return x[..., :half], x[..., half : 2 * half]
