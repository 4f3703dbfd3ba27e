"""Keys of packed sequences that are not simply end to end: in pages, or only a part of each sequence in use."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashtile.kvcache.cache import Cache, pack
from flashtile.kvcache.checks import INTEGERS, check_contents
from flashtile.kvcache.reports import Finding, look, on_host, raise_if_set
from flashtile.validation import check_is_tensor, fail

Packed = tuple[Tensor, Tensor, Tensor]


def packed_from_pages(
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    cu_seqlens_k: Tensor,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Packed:
    """(k, v, cu_seqlens_k) of packed sequences whose tokens lie in pages; differentiable in k and v.

    Args:
        k, v: (pages, page_size, kv_heads, head_dim).
        block_table: int (batch, pages of a sequence), where the pages of each sequence lie, in order.
        cu_seqlens_k: int32 (batch + 1,); its differences are the lengths.
        leftpad_k: int (batch,), tokens at the start of each sequence that are not seen.
        seqused_k: int (batch,), lengths in place of the differences.

    Raises: as `flashtile.kvcache.attention_with_cache`.
    """
    raise_if_set(k.device)
    for name, stored in (("k", k), ("v", v)):
        check_is_tensor(name, stored)
        if stored.ndim != 4 or stored.shape[:3] != k.shape[:3]:
            fail(name, f"shape {tuple(stored.shape)}", "(pages, page_size, kv_heads, head_dim), with a block_table")
    batch = _batch(cu_seqlens_k)
    check_is_tensor("block_table", block_table)
    if block_table.ndim != 2 or block_table.shape[0] != batch:
        fail("block_table", f"shape {tuple(block_table.shape)}", f"({batch}, pages of a sequence)")
    _check_integers(block_table, leftpad_k, seqused_k, batch, k.device)
    lengths = (cu_seqlens_k.diff() if seqused_k is None else seqused_k).long()
    cache = Cache(k, v, lengths, None, leftpad_k, block_table)
    check_contents(cache, 0, 0, 0)
    return _pack(cache, batch * cache.capacity)


def packed_in_use(
    k: Tensor, v: Tensor, cu_seqlens_k: Tensor, leftpad_k: Tensor | None, seqused_k: Tensor | None
) -> Packed:
    """(k, v, cu_seqlens_k) with only the tokens in use of each sequence; differentiable in k and v.

    k, v: (total_k, kv_heads, head_dim); leftpad_k and seqused_k as in `packed_from_pages`.
    """
    for name, tensor in (("k", k), ("v", v)):
        check_is_tensor(name, tensor)
        if tensor.ndim != 3:
            fail(name, f"shape {tuple(tensor.shape)}", "(total, kv_heads, head_dim)")
    batch = _batch(cu_seqlens_k)
    _check_integers(None, leftpad_k, seqused_k, batch, k.device)
    starts, room = cu_seqlens_k[:-1].long(), cu_seqlens_k.diff().long()
    raise_if_set(k.device)
    findings = []
    if seqused_k is not None:
        bad = (seqused_k < 0) | (seqused_k > room)
        findings.append(Finding("seqused_k", seqused_k, bad, "0 to the length of its sequence"))
    if leftpad_k is not None:
        findings.append(Finding("leftpad_k", leftpad_k, leftpad_k < 0, "0 or more"))
    look(findings, k.device)
    used = room if seqused_k is None else torch.minimum(seqused_k.long().clamp(min=0), room)
    skipped = torch.zeros_like(starts) if leftpad_k is None else torch.minimum(leftpad_k.long().clamp(min=0), used)
    # All sequences in one long row: what is to the left of a sequence is its padding.
    row = torch.zeros_like(starts)
    return _pack(Cache(k[None], v[None], starts + used, row, starts + skipped), k.shape[0])


def _pack(cache: Cache, most: int) -> Packed:
    lengths = cache.cache_seqlens if cache.cache_leftpad is None else cache.cache_seqlens - cache.cache_leftpad
    cu_seqlens = pad(lengths.clamp(min=0).cumsum(0), (1, 0)).int()
    total = int(cu_seqlens[-1]) if on_host(cu_seqlens.device) else most
    k, v = (pack(stored, cache, cu_seqlens, total) for stored in (cache.k_cache, cache.v_cache))
    return k, v, cu_seqlens


def _batch(cu_seqlens_k: Tensor) -> int:
    check_is_tensor("cu_seqlens_k", cu_seqlens_k)
    if cu_seqlens_k.ndim != 1 or cu_seqlens_k.shape[0] < 1 or cu_seqlens_k.dtype != torch.int32:
        fail("cu_seqlens_k", f"{cu_seqlens_k.dtype} {tuple(cu_seqlens_k.shape)}", "torch.int32 (batch + 1,)")
    return cu_seqlens_k.shape[0] - 1


def _check_integers(
    block_table: Tensor | None, leftpad_k: Tensor | None, seqused_k: Tensor | None, batch: int, device: torch.device
) -> None:
    for name, tensor in (("block_table", block_table), ("leftpad_k", leftpad_k), ("seqused_k", seqused_k)):
        if tensor is None:
            continue
        check_is_tensor(name, tensor)
        if tensor.dtype not in INTEGERS:
            fail(name, tensor.dtype, "torch.int32 or torch.int64", TypeError)
        if name != "block_table" and tuple(tensor.shape) != (batch,):
            fail(name, f"shape {tuple(tensor.shape)}", f"({batch},)")
        if tensor.device != device:
            fail(name, f"device {tensor.device}", f"{device}, the device of k")
