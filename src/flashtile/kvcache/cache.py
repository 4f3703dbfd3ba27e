"""Where the keys and values of each cached sequence lie; reading them and writing new ones, without a wait."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.kvcache.reports import on_host


class Cache(NamedTuple):
    """Keys and values of earlier tokens.

    k_cache, v_cache: (rows, capacity, kv_heads, head_dim), one row a sequence; or, with a block_table,
        (pages, page_size, kv_heads, head_dim).
    cache_seqlens: int (batch,), the tokens that each sequence holds, its cache_leftpad counted in.
    cache_batch_idx: int (batch,), the row of each sequence; default 0, 1, 2 ...
    cache_leftpad: int (batch,), the tokens at the start of each sequence that are not seen; default 0.
    block_table: int (batch, pages of a sequence), where the pages of each sequence lie, in order.
    """

    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor
    cache_batch_idx: Tensor | None = None
    cache_leftpad: Tensor | None = None
    block_table: Tensor | None = None

    @property
    def capacity(self) -> int:
        """How many tokens a sequence can hold."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * self.k_cache.shape[1]

    @property
    def is_plain(self) -> bool:
        """Sequence b is row b of the cache."""
        return self.block_table is None and self.cache_batch_idx is None


class Rotary(NamedTuple):
    """Tables of a rotary embedding, (positions, rotated / 2); position p of a sequence is turned by row p."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


def append(cache: Cache, k: Tensor, v: Tensor) -> None:
    """Writes k and v, (batch, new, kv_heads, head_dim), behind the tokens that each sequence holds.

    On a GPU, where contents are not looked at before, a token beyond the end of the cache is not written; the last
    place, which stands in for it, may then keep what it held.
    """
    sequence = torch.arange(k.shape[0], device=k.device)[:, None]
    position = cache.cache_seqlens[:, None] + torch.arange(k.shape[1], device=k.device)
    place = _place(cache, sequence, position)
    fits = None if on_host(k.device) else ((position >= 0) & (position < cache.capacity))[..., None, None]
    for stored, new in ((cache.k_cache, k), (cache.v_cache, v)):
        stored[place] = new if fits is None else torch.where(fits, new, stored[place])


def pack(stored: Tensor, cache: Cache, cu_seqlens: Tensor, total: int) -> Tensor:
    """Tokens of all sequences end to end, (total, kv_heads, head_dim), a copy; differentiable in `stored`.

    stored: k_cache or v_cache. cu_seqlens: int32 (batch + 1,), the starts of the result's sequences; each begins with
    the token behind its cache_leftpad. Rows past the last sequence hold any token.
    """
    if not cu_seqlens.shape[0] > 1:
        return stored.new_empty(0, *stored.shape[2:])
    row = torch.arange(total, device=stored.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens[1:], row, right=True).clamp(max=cu_seqlens.shape[0] - 2)
    position = row - cu_seqlens[sequence]
    if cache.cache_leftpad is not None:
        position = position + cache.cache_leftpad[sequence]
    return stored[_place(cache, sequence, position)]


def _place(cache: Cache, sequence: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of tokens in k_cache's first two dimensions, cut to what exists: a GPU must not read elsewhere."""
    position = position.long().clamp(0, max(cache.capacity - 1, 0))
    if cache.block_table is not None:
        size = cache.k_cache.shape[1]
        page = cache.block_table[sequence, position // size]
        return _within(page, cache.k_cache), position % size
    if cache.cache_batch_idx is not None:
        sequence = _within(cache.cache_batch_idx[sequence], cache.k_cache)
    return sequence, position


def _within(index: Tensor, stored: Tensor) -> Tensor:
    return index.long().clamp(0, max(stored.shape[0] - 1, 0))


class Rows(NamedTuple):
    """A contiguous cache as one long sequence of tokens: views, no copy.

    k, v: (rows, kv_heads, head_dim). step: rows from one sequence's first token to the next one's.
    """

    k: Tensor
    v: Tensor
    step: int


def rows_of(cache: Cache) -> Rows:
    """The first sequences of a plain cache, as many as cache_seqlens has, token by token.

    Strides are kept: with (batch, kv_heads, seqlen, head_dim) in memory, rows overlap in address but not in element.
    Only a cache whose two strides do not divide is copied.
    """
    batch = cache.cache_seqlens.shape[0]
    k, v = cache.k_cache[:batch], cache.v_cache[:batch]
    step = _step(k)
    if step is None or step != _step(v):
        k, v, step = k.contiguous(), v.contiguous(), k.shape[1]
    total = (batch - 1) * step + k.shape[1]
    k, v = (t.as_strided((total, *t.shape[2:]), t.stride()[1:]) for t in (k, v))
    return Rows(k, v, step)


def _step(stored: Tensor) -> int | None:
    outer, inner = stored.stride()[:2]
    if inner <= 0 or outer % inner or outer // inner < stored.shape[1]:
        return None
    return outer // inner
