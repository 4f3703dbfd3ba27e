"""What a call with a cache must keep to: shapes at once, contents as `reports` has it."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.kvcache.cache import Cache, Rotary
from flashtile.kvcache.reports import Finding, look
from flashtile.validation import check_is_tensor, fail

New = tuple[Tensor, Tensor]
INTEGERS = (torch.int32, torch.int64)


def check_shapes(
    q: Tensor, cache: Cache, new: New | None = None, rotary: Rotary | None = None, alibi_slopes: Tensor | None = None
) -> None:
    """Raises TypeError or ValueError that names the argument, what it got and what was expected."""
    check_is_tensor("q", q)
    if q.ndim != 4:
        fail("q", f"shape {tuple(q.shape)}", "(batch, seqlen, heads, head_dim)")
    _check_stored(q, cache)
    batch = q.shape[0]
    _check_integers("cache_seqlens", cache.cache_seqlens, (batch,), q)
    for name in ("cache_batch_idx", "cache_leftpad"):
        if getattr(cache, name) is not None:
            _check_integers(name, getattr(cache, name), (batch,), q)
    if cache.block_table is not None:
        _check_paged(q, cache, batch)
    elif cache.cache_batch_idx is None and cache.k_cache.shape[0] < batch:
        fail("k_cache", f"{cache.k_cache.shape[0]} sequences", f"at least {batch}, the batch of q")
    if new is not None:
        _check_new(q, cache, new)
    if rotary is not None:
        _check_rotary(q, cache, rotary)
    if alibi_slopes is not None:
        check_is_tensor("alibi_slopes", alibi_slopes)
        if tuple(alibi_slopes.shape) not in ((q.shape[2],), (batch, q.shape[2])):
            fail("alibi_slopes", f"shape {tuple(alibi_slopes.shape)}", f"({q.shape[2]},) or ({batch}, {q.shape[2]})")


def _check_stored(q: Tensor, cache: Cache) -> None:
    k, v = cache.k_cache, cache.v_cache
    for name, stored in (("k_cache", k), ("v_cache", v)):
        check_is_tensor(name, stored)
        if stored.ndim != 4:
            fail(name, f"shape {tuple(stored.shape)}", "4 dimensions: (.., .., kv_heads, head_dim)")
        _check_like_q(name, stored, q)
    if v.shape[:3] != k.shape[:3]:
        fail("v_cache", f"shape {tuple(v.shape)}", f"{tuple(k.shape[:3])} before the head dim, as k_cache")
    heads, kv_heads = q.shape[2], k.shape[2]
    if (heads % kv_heads if kv_heads else heads) != 0:
        fail("k_cache", f"{kv_heads} heads", f"a divisor of {heads}, the heads of q")
    if k.shape[3] != q.shape[3]:
        fail("k_cache", f"head_dim {k.shape[3]}", f"{q.shape[3]}, the head_dim of q")


def _check_paged(q: Tensor, cache: Cache, batch: int) -> None:
    table = cache.block_table
    assert table is not None
    check_is_tensor("block_table", table)
    if table.ndim != 2:
        fail("block_table", f"shape {tuple(table.shape)}", "(batch, pages of a sequence)")
    _check_integers("block_table", table, (batch, table.shape[1]), q)
    if cache.cache_batch_idx is not None:
        fail("cache_batch_idx", "a tensor beside a block_table", "None: a block_table says where each sequence lies")


def _check_new(q: Tensor, cache: Cache, new: New) -> None:
    for name, tensor, stored in (("k", new[0], cache.k_cache), ("v", new[1], cache.v_cache)):
        check_is_tensor(name, tensor)
        _check_like_q(name, tensor, q)
        rows = tensor.shape[1] if tensor.ndim == 4 else None
        wanted = (q.shape[0], new[0].shape[1] if name == "v" else rows, *stored.shape[2:])
        if tuple(tensor.shape) != wanted:
            fail(name, f"shape {tuple(tensor.shape)}", f"(batch, new tokens, kv_heads, head_dim) = {wanted}")
    if new[0].shape[1] > cache.capacity:
        fail("k", f"{new[0].shape[1]} new tokens", f"at most {cache.capacity}, which the cache can hold")


def _check_rotary(q: Tensor, cache: Cache, rotary: Rotary) -> None:
    for name, table in (("rotary_cos", rotary.cos), ("rotary_sin", rotary.sin)):
        check_is_tensor(name, table)
        if not table.is_floating_point():
            fail(name, table.dtype, "a floating-point dtype", TypeError)
        if table.device != q.device:
            fail(name, f"device {table.device}", f"{q.device}, the device of q")
        if table.ndim != 2 or 2 * table.shape[1] > q.shape[3] or table.shape[0] < cache.capacity:
            wanted = f"({cache.capacity} positions or more, at most {q.shape[3] // 2})"
            fail(name, f"shape {tuple(table.shape)}", wanted)
    if rotary.sin.shape != rotary.cos.shape:
        fail("rotary_sin", f"shape {tuple(rotary.sin.shape)}", f"{tuple(rotary.cos.shape)}, as rotary_cos")


def _check_like_q(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.dtype != q.dtype:
        fail(name, tensor.dtype, f"{q.dtype}, the dtype of q", TypeError)
    if tensor.device != q.device:
        fail(name, f"device {tensor.device}", f"{q.device}, the device of q")


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    check_is_tensor(name, tensor)
    if tensor.dtype not in INTEGERS:
        fail(name, tensor.dtype, "torch.int32 or torch.int64", TypeError)
    if tuple(tensor.shape) != shape:
        fail(name, f"shape {tuple(tensor.shape)}", f"{shape}")
    if tensor.device != q.device:
        fail(name, f"device {tensor.device}", f"{q.device}, the device of q")


def check_contents(cache: Cache, new_len: int, rotary_span: int, rotary_len: int) -> None:
    """Lengths fit the cache, indices exist, and rotary positions have rows; see `reports.look` for when it raises.

    rotary_span: rows of the rotary tables that a sequence needs from its length on; 0 without rotary embedding.
    """
    lengths, capacity, rows = cache.cache_seqlens, cache.capacity, cache.k_cache.shape[0]
    room = capacity - new_len
    beside = f" less {new_len} new" if new_len else ""
    outside = (lengths < 0) | (lengths > room)
    findings = [Finding("cache_seqlens", lengths, outside, f"0 to {room}: the cache's {capacity} tokens{beside}")]
    if cache.cache_batch_idx is not None:
        index = cache.cache_batch_idx
        findings.append(Finding("cache_batch_idx", index, (index < 0) | (index >= rows), f"0 to {rows - 1}, a row"))
    if cache.cache_leftpad is not None:
        findings.append(Finding("cache_leftpad", cache.cache_leftpad, cache.cache_leftpad < 0, "0 or more"))
    if cache.block_table is not None:
        table, size = cache.block_table, cache.k_cache.shape[1]
        first = torch.arange(table.shape[1], device=table.device) * size
        used = first < (lengths + new_len)[:, None]
        bad = used & ((table < 0) | (table >= rows))
        findings.append(Finding("block_table", table, bad, f"0 to {rows - 1}, a page, for each page in use"))
    if rotary_span:
        last = rotary_len - rotary_span
        expected = f"cos and sin for each position: at most {last} tokens before the new ones"
        findings.append(Finding("rotary_cos", lengths, lengths > last, expected))
    look(findings, lengths.device)
