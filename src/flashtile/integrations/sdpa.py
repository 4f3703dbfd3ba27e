"""PyTorch's `scaled_dot_product_attention`, by the same name and with the same meaning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashtile import masks, ops
from flashtile.api import prepare, renamed
from flashtile.problem import Call
from flashtile.validation import check_is_tensor, fail

NAMES = {"q": "query", "k": "key", "v": "value", "bias": "attn_mask"}


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Exact attention with the arguments, layout and semantics of torch.nn.functional.scaled_dot_product_attention.

    The layout (batch, heads, seqlen, head_dim) is read and written through strides: nothing is transposed in memory.

    Args:
        query: (..., heads, q_len, head_dim): any number of leading dimensions; heads may be absent too.
        key: (..., kv_heads, k_len, head_dim); value: (..., kv_heads, k_len, v_dim). All but the last two dimensions
            broadcast, as in a matrix product.
        attn_mask: broadcastable to (..., heads, q_len, k_len), at least 2-D; boolean (True is seen) or added to the
            scores, in float32 or query's dtype. Its gradient is computed. Or causal_upper_left or causal_lower_right
            of torch.nn.attention.bias, which are never made into a matrix here.
        dropout_p: probability of dropping an attention weight; always applied, as in PyTorch. Default 0.
        is_causal: row i sees the keys 0 to i (top-left alignment); not together with attn_mask.
        scale: factor of the scores; default 1 / sqrt(head_dim).
        enable_gqa: kv_heads, the same in key and value, may be any divisor of heads.

    Returns:
        (..., heads, q_len, v_dim) in query's dtype, rows and heads in memory in query's order. A row that sees nothing
        gives 0.

    Raises:
        TypeError, ValueError: a bad argument (mostly RuntimeError in PyTorch), named with got and expected.
        NotImplementedError: no backend can serve the call.

    Source: torch.nn.functional.scaled_dot_product_attention.

    >>> import torch, flashtile
    >>> q = k = v = torch.randn(1, 4, 128, 64)
    >>> flashtile.scaled_dot_product_attention(q, k, v, is_causal=True).shape
    torch.Size([1, 4, 128, 64])
    """
    try:
        call, rank, batch = prepared(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        return in_their_layout(ops.attention(call)[0], rank, batch)
    except (TypeError, ValueError) as error:
        raise renamed(error, NAMES) from None


def prepared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[Call, int, list[int]]:
    """The native call, and the result's rank and its dimensions before heads."""
    _check(query, key, value, attn_mask, is_causal, enable_gqa)
    mask = None
    if type(attn_mask).__name__ == "CausalBias":  # of torch.nn.attention.bias, a tensor in name only
        mask, attn_mask = _causal_bias(attn_mask, query.shape[-2], key.shape[-2]), None
    rank, batch = query.ndim, list(query.shape[:-3])
    if not _is_plain(query, key, value, enable_gqa):
        rank, batch, query, key, value, attn_mask = _four_dimensional(query, key, value, attn_mask, enable_gqa)
    if is_causal:
        mask = masks.Window(None, query.shape[2] - key.shape[2])
    call = Call(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask, dropout_p=dropout_p)
    return prepare(call, mask, scale, None), rank, batch


def _causal_bias(bias: Any, q_len: int, k_len: int) -> masks.Mask:
    """A causal_upper_left or causal_lower_right object as a mask."""
    if (bias.seq_len_q, bias.seq_len_kv) != (q_len, k_len):
        fail("attn_mask", f"a CausalBias of {bias.seq_len_q} by {bias.seq_len_kv}", f"{q_len} by {k_len}")
    return masks.Causal() if bias.variant.name == "LOWER_RIGHT" else masks.Window(None, q_len - k_len)


def in_their_layout(out: Tensor, rank: int, batch: list[int]) -> Tensor:
    """(..., heads, q_len, v_dim) of the native result."""
    out = out.transpose(1, 2)
    return out if rank == 4 else out.unflatten(0, batch)[(0,) * (4 - rank)]


def _check(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check_is_tensor(name, tensor)
        if tensor.ndim < 2:
            fail(name, f"shape {tuple(tensor.shape)}", "at least 2 dimensions, (..., seqlen, head_dim)")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            fail(name, type(flag).__name__, "a bool", TypeError)
    if attn_mask is None:
        return
    check_is_tensor("attn_mask", attn_mask)
    if is_causal:
        fail("attn_mask", "a mask together with is_causal=True", "one or the other")
    rank = max(query.ndim, key.ndim, value.ndim)
    if not 2 <= attn_mask.ndim <= rank and type(attn_mask).__name__ != "CausalBias":
        fail("attn_mask", f"shape {tuple(attn_mask.shape)}", f"2 to {rank} dimensions, (..., q_len, k_len)")


def _is_plain(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> bool:
    """Whether the native call takes these as they are: four dimensions, nothing to broadcast but a single kv head."""
    return (
        query.ndim == key.ndim == value.ndim == 4
        and query.shape[0] == key.shape[0] == value.shape[0]
        and key.shape[1] == value.shape[1]
        and (enable_gqa or key.shape[1] in (1, query.shape[1]))
    )


def _four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, enable_gqa: bool
) -> tuple[int, list[int], Tensor, Tensor, Tensor, Tensor | None]:
    """(rank of the result, its dimensions before heads, and the arguments with these in one batch dimension)."""
    rank = max(query.ndim, key.ndim, value.ndim)
    q, k, v = (t[(None,) * (max(rank, 4) - t.ndim)] for t in (query, key, value))
    kept = 3 if enable_gqa else 2  # without enable_gqa heads broadcast too
    try:
        leading = torch.broadcast_shapes(q.shape[:-kept], k.shape[:-kept], v.shape[:-kept])
    except RuntimeError:
        got = f"shape {tuple(key.shape)} beside value {tuple(value.shape)}"
        fail("key", got, f"dimensions before the last {kept} that broadcast with query {tuple(query.shape)}")
    if enable_gqa:
        if k.shape[-3] != v.shape[-3]:
            fail("value", f"{v.shape[-3]} heads", f"{k.shape[-3]}, the heads of key")
        leading = (*leading, q.shape[-3])
    *batch, heads = leading
    shared = enable_gqa or k.shape[-3] == v.shape[-3] == 1
    q = q.expand(*batch, heads, -1, -1).flatten(0, -4)
    k, v = (t.expand(*batch, -1 if shared else heads, -1, -1).flatten(0, -4) for t in (k, v))
    if attn_mask is not None and rank > 4 and attn_mask.ndim > 3:
        attn_mask = _flat_mask(attn_mask[(None,) * (rank - attn_mask.ndim)], batch)
    return rank, batch, q, k, v, attn_mask


def _flat_mask(attn_mask: Tensor, batch: list[int]) -> Tensor:
    """The mask of more than one batch dimension with one; copied only where it really differs along several."""
    if any(have not in (1, want) for have, want in zip(attn_mask.shape, batch, strict=False)):
        fail("attn_mask", f"shape {tuple(attn_mask.shape)}", f"batch dimensions that broadcast to {tuple(batch)}")
    if all(have == 1 for have in attn_mask.shape[:-3]):
        return attn_mask.flatten(0, -4)
    return attn_mask.expand(*batch, -1, -1, -1).flatten(0, -4)
