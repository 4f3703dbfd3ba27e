"""flash_attn_with_kvcache of flash_attn 2.8: attention over a cache that is appended to in place."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.api import combine, renamed
from flashtile.integrations.flash_attn.functions import WindowSize, as_the_original, check_num_splits, check_tensors
from flashtile.kvcache import Cache, Rotary, Scoring, attention_with_cache
from flashtile.validation import check_is_tensor, fail

_NAMES = {"scale": "softmax_scale", "window": "window_size"}


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Writes k and v into the cache behind what it holds, in place, and attends to all of it.

    The result carries no gradient, as in the original; the causal mask and the window are aligned at the last token.

    Args:
        q: (batch, q_len, heads, head_dim).
        k_cache, v_cache: (rows, capacity, kv_heads, head_dim), any strides; with a block_table
            (pages, page_size, kv_heads, head_dim), pages of any size.
        k, v: (batch, new tokens, kv_heads, head_dim), written at cache_seqlens, cache_seqlens + 1 ...; both or none.
        rotary_cos, rotary_sin: (positions, rotated / 2), at least as many positions as the cache holds tokens. New keys
            are turned by their own positions, queries by cache_seqlens, cache_seqlens + 1 ... where the call is causal
            or has a window narrower than the cache, else all by cache_seqlens. Only together with k and v.
        cache_seqlens: tokens that each sequence holds before the call; int, or int32 (batch,). Default: a full cache.
        cache_batch_idx: int32 (batch,), the cache's row of each sequence; not with a block_table.
        cache_leftpad: int32 (batch,), tokens at the start of each sequence that are not seen.
        block_table: int32 (batch, pages of a sequence), where the pages of each sequence lie, in order.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as flash_attn_func.
        rotary_interleaved: pairs are neighbours (GPT-J); else the two halves of the rotated elements (GPT-NeoX).
        num_splits: how many parts a kernel may cut the keys into; 0 leaves it to the backend. It is a matter of speed:
            the result is the same up to rounding, and no backend cuts keys yet.
        return_softmax_lse: also return the log-sum-exp of the scores.

    Returns:
        out (batch, q_len, heads, head_dim), or (out, lse) with lse float32 (batch, heads, q_len), +inf for a query that
        sees no key (its out is 0).

    Raises:
        TypeError, ValueError: a bad argument. Contents that are out of range on a GPU are reported by the next call
            there, or by `flashtile.check_device_errors`.

    Source: flash_attn 2.8, flash_attn_interface.py.
    """
    check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    _check_flags(rotary_interleaved, num_splits, return_softmax_lse)
    new = _both("k", k, "v", v)
    tables = _both("rotary_cos", rotary_cos, "rotary_sin", rotary_sin)
    cache = Cache(k_cache, v_cache, k_cache, cache_batch_idx, cache_leftpad, block_table)
    cache = cache._replace(cache_seqlens=_lengths(q, cache, cache_seqlens, new))
    if tables is not None and new is None:
        fail("rotary_cos", "a tensor without k and v", "new keys and values to be rotated and cached")
    rotary = None if tables is None else Rotary(*tables, rotary_interleaved)
    try:
        scoring = Scoring(combine(None, causal, window_size), softmax_scale, softcap, alibi_slopes)
        with torch.no_grad():
            out, lse = attention_with_cache(q, cache, new, rotary, scoring)
    except (TypeError, ValueError) as error:
        raise renamed(error, _NAMES) from None
    return (out, as_the_original(lse)) if return_softmax_lse else out


def _check_flags(rotary_interleaved: bool, num_splits: int, return_softmax_lse: bool) -> None:
    for name, flag in (("rotary_interleaved", rotary_interleaved), ("return_softmax_lse", return_softmax_lse)):
        if not isinstance(flag, bool):
            fail(name, type(flag).__name__, "a bool", TypeError)
    check_num_splits(num_splits)


def _both(first: str, a: Tensor | None, second: str, b: Tensor | None) -> tuple[Tensor, Tensor] | None:
    for name, tensor in ((first, a), (second, b)):
        if tensor is not None:
            check_is_tensor(name, tensor)
    if (a is None) != (b is None):
        missing, given = (first, second) if a is None else (second, first)
        fail(missing, f"None beside {given}", "both or none")
    return None if a is None or b is None else (a, b)


def _lengths(q: Tensor, cache: Cache, lengths: int | Tensor | None, new: tuple[Tensor, Tensor] | None) -> Tensor:
    """cache_seqlens as a tensor of q's batch; a number is compared with the cache at once, whatever the device."""
    if isinstance(lengths, Tensor):
        return lengths
    if cache.k_cache.ndim != 4:
        fail("k_cache", f"shape {tuple(cache.k_cache.shape)}", "4 dimensions: (.., .., kv_heads, head_dim)")
    if cache.block_table is not None:
        check_is_tensor("block_table", cache.block_table)
        if cache.block_table.ndim != 2:
            fail("block_table", f"shape {tuple(cache.block_table.shape)}", "(batch, pages of a sequence)")
    if lengths is None:
        if new is not None:
            fail("cache_seqlens", "None beside k and v", "the number of tokens that the cache holds before them")
        lengths = cache.capacity
    elif isinstance(lengths, bool) or not isinstance(lengths, int):
        fail("cache_seqlens", type(lengths).__name__, "an int or a tensor", TypeError)
    room = cache.capacity - (0 if new is None or new[0].ndim < 2 else new[0].shape[1])
    if not 0 <= lengths <= room:
        fail("cache_seqlens", lengths, f"0 to {room}, what the cache can hold before the new tokens")
    return torch.full(q.shape[:1], lengths, dtype=torch.int32, device=q.device)
