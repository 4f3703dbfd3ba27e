"""The functions of the flash_attn 2.8 package, with its parameter names, order, defaults and meaning.

Beyond the original: any device, float32 and float64, a value head_dim of its own, a differentiable lse. A
`window_size` side of -1 is unlimited; window and causal mask are aligned at the bottom right. Packed inputs stay
packed: the gradient of qkv or kv is one tensor, written in place.

Errors are those of `flashtile.attention`, in these functions' argument names. Source: flash_attn 2.8,
flash_attn_interface.py; FlashAttention-2 (Dao 2023, arXiv 2307.08691).

With return_attn_probs=True each function returns (out, lse, S_dmask): lse (batch, heads, q_len) or (heads, total_q),
+inf for a row that sees nothing; S_dmask as `signed_probabilities` makes it, empty without dropout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flashtile.api import combine, prepare, renamed
from flashtile.integrations.dropout_pattern import signed_probabilities
from flashtile.ops import attention as attend
from flashtile.problem import Call
from flashtile.validation import check_is_tensor

Result = Tensor | tuple[Tensor, Tensor, Tensor]
WindowSize = Sequence[int] | Tensor

_NAMES = {"scale": "softmax_scale", "window": "window_size"}
_QKV_NAMES = {**_NAMES, "q": "qkv", "k": "qkv", "v": "qkv", "cu_seqlens_q": "cu_seqlens", "max_seqlen_q": "max_seqlen"}
_KV_NAMES = {**_NAMES, "k": "kv", "v": "kv"}


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of q (batch, q_len, heads, head_dim) over k, v (batch, k_len, kv_heads, head_dim).

    See the module for what is common to all, `flashtile.attention` for the meaning and defaults of each argument.
    """
    _check_tensors(k=k, v=v)
    call = Call(q, k, v, None, alibi_slopes, softcap=softcap, dropout_p=dropout_p, deterministic=deterministic)
    return _attend(call, softmax_scale, causal, window_size, return_attn_probs, _NAMES)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """As flash_attn_func, with k and v in one kv (batch, k_len, 2, kv_heads, head_dim)."""
    _check_tensors(kv=kv)
    call = Call(q, kv, None, None, alibi_slopes, softcap=softcap, dropout_p=dropout_p, deterministic=deterministic)
    return _attend(call, softmax_scale, causal, window_size, return_attn_probs, _KV_NAMES)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """As flash_attn_func, with q, k and v in one qkv (batch, seqlen, 3, heads, head_dim)."""
    call = Call(qkv, None, None, None, alibi_slopes, softcap=softcap, dropout_p=dropout_p, deterministic=deterministic)
    return _attend(call, softmax_scale, causal, window_size, return_attn_probs, _QKV_NAMES)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention of packed sequences: q (total_q, heads, head_dim) over k, v (total_k, kv_heads, head_dim).

    cu_seqlens_q, cu_seqlens_k: int32 (batch + 1,); max_seqlen_q, max_seqlen_k: the longest sequence.
    Raises NotImplementedError for a block_table (a paged key-value cache).
    """
    if block_table is not None:
        raise NotImplementedError("block_table: got a paged key-value cache, expected None")
    _check_tensors(k=k, v=v, cu_seqlens_q=cu_seqlens_q)
    call = Call(
        q, k, v, None, alibi_slopes, None, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        softcap=softcap, dropout_p=dropout_p, deterministic=deterministic,
    )  # fmt: skip
    return _attend(call, softmax_scale, causal, window_size, return_attn_probs, _NAMES)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """As flash_attn_varlen_func, with k and v in one kv (total_k, 2, kv_heads, head_dim)."""
    _check_tensors(kv=kv, cu_seqlens_q=cu_seqlens_q)
    call = Call(
        q, kv, None, None, alibi_slopes, None, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        softcap=softcap, dropout_p=dropout_p, deterministic=deterministic,
    )  # fmt: skip
    return _attend(call, softmax_scale, causal, window_size, return_attn_probs, _KV_NAMES)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: WindowSize = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """As flash_attn_varlen_func, with q, k and v in one qkv (total, 3, heads, head_dim)."""
    _check_tensors(cu_seqlens=cu_seqlens)
    call = Call(
        qkv, None, None, None, alibi_slopes, None, cu_seqlens, cu_seqlens,
        max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
        softcap=softcap, dropout_p=dropout_p, deterministic=deterministic,
    )  # fmt: skip
    return _attend(call, softmax_scale, causal, window_size, return_attn_probs, _QKV_NAMES)


def _check_tensors(**tensors: object) -> None:
    # None in the place of one of these would give the call another form.
    for name, tensor in tensors.items():
        check_is_tensor(name, tensor)


def _attend(
    call: Call,
    softmax_scale: float | None,
    causal: bool,
    window_size: WindowSize,
    return_attn_probs: bool,
    names: Mapping[str, str],
) -> Result:
    try:
        call = prepare(call, combine(None, causal, window_size), softmax_scale, call.deterministic or None)
        out, lse = attend(call)
    except (TypeError, ValueError) as error:
        raise renamed(error, names) from None
    if not return_attn_probs:
        return out
    lse = torch.where(lse == -torch.inf, torch.inf, lse)
    return out, lse, signed_probabilities(call)
