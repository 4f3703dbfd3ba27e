"""Attention over a cache as one call with packed sequences: every backend that has those serves it.

A contiguous cache is read where it lies. Its tokens, end to end, are sequences with queries and, between them, gaps
without: what each row has left and right of its tokens. Sequence b of B is the packed sequence 2 b + 1 of 2 B + 1:

    tokens    |gap|  row 0  |   gap   |  row 1  | ... |gap|
    queries   |   | seqlen  |         | seqlen  | ... |   |

Nothing is copied, no length is read on the host, and what uninitialised memory a gap holds is never looked at. Paged
caches and those with cache_batch_idx are packed by a copy first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashtile.api import attention_varlen
from flashtile.kvcache.cache import Cache, Rotary, append, pack, rows_of
from flashtile.kvcache.checks import New, check_contents, check_shapes
from flashtile.kvcache.reports import on_host, raise_if_set
from flashtile.masks import Mask
from flashtile.rotary import rotate


class Scoring(NamedTuple):
    """What the scores of `flashtile.attention` depend on beside q and k: its arguments of these names."""

    mask: Mask | None = None
    scale: float | None = None
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None


PLAIN = Scoring()


class _Packed(NamedTuple):
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    longest: int
    alibi_slopes: Tensor | None


def attention_with_cache(
    q: Tensor,
    cache: Cache,
    new: New | None = None,
    rotary: Rotary | None = None,
    scoring: Scoring = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Appends new keys and values to a cache, in place, and attends to all it then holds; without gradients.

    A compiler leaves its graph here, and takes it up again behind the call.

    Args:
        q: (batch, seqlen, heads, head_dim). The last query stands at the last token of its sequence.
        cache: see `Cache`; its cache_seqlens does not count the new tokens and is left as it is.
        new: (k, v), each (batch, new tokens, kv_heads, head_dim).
        rotary: turns new keys by the tables' rows cache_seqlens, cache_seqlens + 1 ... and queries likewise; where the
            mask sets no bound on a query's keys, all of its queries stand at row cache_seqlens.
        scoring: mask, scale, softcap and ALiBi slopes.

    Returns:
        (out, lse) as `flashtile.attention`: lse (batch, heads, seqlen), -inf for a query that sees no key.

    Raises:
        TypeError, ValueError: a bad argument. Contents that are out of range on a GPU (cache_seqlens beyond the cache,
            an index of a page that does not exist) are reported by the next call on that device, or by
            `flashtile.check_device_errors`; until then nothing out of bounds is read or written.
    """
    if torch.compiler.is_compiling():
        # Looking at contents, and raising what an earlier call found wrong with its own, cannot be part of a graph.
        return torch.compiler.disable(_attention_with_cache)(q, cache, new, rotary, scoring)
    return _attention_with_cache(q, cache, new, rotary, scoring)


def _attention_with_cache(
    q: Tensor, cache: Cache, new: New | None, rotary: Rotary | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    raise_if_set(q.device)
    check_shapes(q, cache, new, rotary, scoring.alibi_slopes)
    new_len = 0 if new is None else new[0].shape[1]
    advances = _is_bounded(scoring.mask, cache.capacity)
    rotary_len, rotary_span = 0, 0
    if rotary is not None:
        rotary_len, rotary_span = rotary.cos.shape[0], max(new_len, q.shape[1] if advances else 1)
    check_contents(cache, new_len, rotary_span, rotary_len)
    with torch.no_grad():
        if rotary is not None:
            q = _turned(q, cache, rotary, advances)
            new = None if new is None else (_turned(new[0], cache, rotary, True), new[1])
        if new is not None:
            append(cache, *new)
            cache = cache._replace(cache_seqlens=cache.cache_seqlens + new_len)
        return _attend(q, cache, scoring)


def _is_bounded(mask: Mask | None, capacity: int) -> bool:
    """Whether a mask hides keys of a full cache on either side of a query's own position."""
    sides = (None, None) if mask is None else mask.distances()
    return sides is None or any(side is not None and side < capacity for side in sides)


def _turned(x: Tensor, cache: Cache, rotary: Rotary, advances: bool) -> Tensor:
    position = cache.cache_seqlens.long()[:, None]  # [batch, 1]
    if advances:
        position = position + torch.arange(x.shape[1], device=x.device)
    position = position.clamp(0, max(rotary.cos.shape[0] - 1, 0))
    return rotate(x, rotary.cos[position], rotary.sin[position], interleaved=rotary.interleaved)


def _attend(q: Tensor, cache: Cache, scoring: Scoring) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _ = q.shape
    packed = _in_place(q, cache, scoring.alibi_slopes) if cache.is_plain else _copied(q, cache, scoring.alibi_slopes)
    out, lse = attention_varlen(
        q.flatten(0, 1),
        packed.k,
        packed.v,
        packed.cu_seqlens_q,
        packed.cu_seqlens_k,
        q_len,
        packed.longest,
        mask=scoring.mask,
        scale=scoring.scale,
        softcap=scoring.softcap,
        alibi_slopes=packed.alibi_slopes,
        return_lse=True,
    )
    return out.unflatten(0, (batch, q_len)), lse.view(heads, batch, q_len).transpose(0, 1).contiguous()


def _lengths(cache: Cache) -> tuple[Tensor, Tensor]:
    """(first, end) of the tokens seen, int64 (batch,), within the capacity."""
    end = cache.cache_seqlens.long().clamp(0, cache.capacity)
    first = torch.zeros_like(end) if cache.cache_leftpad is None else cache.cache_leftpad.long().clamp(min=0)
    return torch.minimum(first, end), end


def _in_place(q: Tensor, cache: Cache, slopes: Tensor | None) -> _Packed:
    """The sequences and gaps of the page's head, for a cache whose row b is sequence b."""
    batch, q_len = q.shape[:2]
    if batch == 0 or cache.capacity == 0:
        return _copied(q, cache, slopes)
    rows = rows_of(cache)
    first, end = _lengths(cache)
    row = torch.arange(batch, device=q.device) * rows.step
    cu_k = torch.full((2 * batch + 2,), rows.k.shape[0], dtype=torch.int32, device=q.device)
    cu_k[:1].zero_()  # assigning a number would copy it from the host, and wait
    cu_k[1:-1] = torch.stack([row + first, row + end], 1).flatten()
    cu_q = torch.arange(2 * batch + 2, device=q.device, dtype=torch.int32) // 2 * q_len
    if slopes is not None and slopes.ndim == 2:
        spread = slopes.new_zeros(2 * batch + 1, slopes.shape[1])
        spread[1::2] = slopes
        slopes = spread
    longest = rows.step if cache.cache_leftpad is None else 2 * rows.step  # a gap may reach into the next row
    return _Packed(rows.k, rows.v, cu_q, cu_k, longest, slopes)


def _copied(q: Tensor, cache: Cache, slopes: Tensor | None) -> _Packed:
    """One packed sequence each; without a look at the lengths, memory for as many tokens as the cache can hold."""
    batch, q_len = q.shape[:2]
    first, end = _lengths(cache)
    cu_k = pad((end - first).cumsum(0), (1, 0)).int()
    total = int(cu_k[-1]) if on_host(q.device) else batch * cache.capacity
    cu_q = torch.arange(batch + 1, device=q.device, dtype=torch.int32) * q_len
    k, v = (pack(stored, cache, cu_k, total) for stored in (cache.k_cache, cache.v_cache))
    return _Packed(k, v, cu_q, cu_k, cache.capacity, slopes)
