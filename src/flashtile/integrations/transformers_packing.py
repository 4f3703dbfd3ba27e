"""Sequences packed end to end in a batch of one: told by offsets, or by positions that start anew at 0."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from flashtile import masks

Bounds = tuple[Tensor, Tensor]

_last: tuple[weakref.ref[Tensor], int, Bounds | None] | None = None


def from_positions(position_ids: object, q_len: int, k_len: int) -> Bounds | None:
    """(first, end) of each row's sequence, int32 (1, q_len); None where there is only one.

    Every position 0 starts a sequence, as for transformers' flash attention. All layers of a model get the same
    position_ids: what they say is kept from one layer to the next, because looking waits for the device.
    """
    global _last
    if (
        not isinstance(position_ids, Tensor)
        or position_ids.shape != (1, q_len)
        or q_len == 1
        or q_len != k_len
        or torch.compiler.is_compiling()
    ):
        return None
    if position_ids.is_inference():  # without a version nobody knows whether it changed
        return _read(position_ids)
    last = _last
    if last is None or last[0]() is not position_ids or last[1] != position_ids._version:
        _last = last = (weakref.ref(position_ids), position_ids._version, _read(position_ids))
    return last[2]


def _read(position_ids: Tensor) -> Bounds | None:
    starts = position_ids[0] == 0
    number = starts.cumsum(0)
    if number[-1] <= starts[0]:
        return None
    number = number.contiguous()
    first, end = torch.searchsorted(number, number), torch.searchsorted(number, number, right=True)
    return first[None].to(torch.int32), end[None].to(torch.int32)


def from_offsets(rows: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Bounds:
    """The same from int32 offsets; rows behind the last sequence see nothing."""
    row = torch.arange(rows, device=cu_seqlens_q.device, dtype=torch.int32)
    number = torch.searchsorted(cu_seqlens_q[1:].contiguous(), row, right=True)
    ends = torch.cat([cu_seqlens_k, cu_seqlens_k[-1:]])
    return ends[number][None], ends[number + 1][None]


def band_bounds(band: masks.Mask | None, q_len: int, k_len: int, device: torch.device) -> Bounds:
    """A causal mask or a window as bounds of each row, int32 (1, q_len)."""
    row = torch.arange(q_len, device=device)[None]
    lo, hi = (band or masks.Full()).bounds(row, q_len, k_len)
    return lo.to(torch.int32), hi.to(torch.int32)


def intersection(a: Bounds, b: Bounds) -> Bounds:
    return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])
