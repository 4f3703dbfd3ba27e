"""The six attention functions of flash_attn 2.8, with their parameter names, order, defaults and meaning.

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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashtile.api import combine, prepare, renamed
from flashtile.integrations.flash_attn.dropout_pattern import signed_probabilities
from flashtile.kvcache import packed_from_pages
from flashtile.ops import attention as attend
from flashtile.problem import Call
from flashtile.validation import check_is_tensor, fail

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
    check_tensors(k=k, v=v)
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
    check_tensors(kv=kv)
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
    block_table: int32 (batch, pages of a sequence); k and v are then (pages, page_size, kv_heads, head_dim) with pages
    of any size, cu_seqlens_k gives the lengths, and the tokens are copied end to end first.
    """
    check_tensors(k=k, v=v, cu_seqlens_q=cu_seqlens_q)
    if block_table is not None:
        k, v, cu_seqlens_k = from_pages(k, v, block_table, cu_seqlens_k)
    call = Call(
        q, k, v, None, alibi_slopes, None, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q=as_length(max_seqlen_q), max_seqlen_k=as_length(max_seqlen_k),
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
    check_tensors(kv=kv, cu_seqlens_q=cu_seqlens_q)
    call = Call(
        q, kv, None, None, alibi_slopes, None, cu_seqlens_q, cu_seqlens_k,
        max_seqlen_q=as_length(max_seqlen_q), max_seqlen_k=as_length(max_seqlen_k),
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
    check_tensors(cu_seqlens=cu_seqlens)
    call = Call(
        qkv, None, None, None, alibi_slopes, None, cu_seqlens, cu_seqlens,
        max_seqlen_q=as_length(max_seqlen), max_seqlen_k=as_length(max_seqlen),
        softcap=softcap, dropout_p=dropout_p, deterministic=deterministic,
    )  # fmt: skip
    return _attend(call, softmax_scale, causal, window_size, return_attn_probs, _QKV_NAMES)


def check_tensors(**tensors: object) -> None:
    """Raises TypeError for what is no tensor; None in the place of k or v would give the call another form."""
    for name, tensor in tensors.items():
        check_is_tensor(name, tensor)


def as_length(longest: Any) -> Any:
    """max_seqlen as a number: software passes tensors of one integer too, as lengths.max() gives them.

    Reading one waits for its device, as it does in the original. What is no integer is left for validation to name.
    """
    if isinstance(longest, Tensor) and longest.numel() == 1 and longest.dtype in (torch.int32, torch.int64):
        return int(longest)
    return int(longest) if isinstance(longest, np.integer) else longest


def check_num_splits(num_splits: object) -> None:
    """num_splits is a matter of speed that is left to the backend; it must still be what it says."""
    if isinstance(num_splits, bool) or not isinstance(num_splits, int):
        fail("num_splits", type(num_splits).__name__, "an int", TypeError)
    if num_splits < 0:
        fail("num_splits", num_splits, "0 or more")


def from_pages(
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    cu_seqlens_k: Tensor,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`packed_from_pages`, its errors in the names of the varlen functions."""
    names = {"cache_seqlens": "cu_seqlens_k" if seqused_k is None else "seqused_k", "cache_leftpad": "leftpad_k"}
    try:
        return packed_from_pages(k, v, block_table, cu_seqlens_k, leftpad_k, seqused_k)
    except (TypeError, ValueError) as error:
        raise renamed(error, names) from None


def _attend(
    call: Call,
    softmax_scale: float | None,
    causal: bool,
    window_size: WindowSize,
    return_attn_probs: bool,
    names: Mapping[str, str],
) -> Result:
    # The usual value is known at sight: making a mask that hides nothing takes 10 us.
    window = None if isinstance(window_size, tuple) and window_size == (-1, -1) else window_size
    try:
        call = prepare(call, combine(None, causal, window), softmax_scale, call.deterministic or None)
        out, lse = attend(call)
    except (TypeError, ValueError) as error:
        raise renamed(error, names) from None
    if not return_attn_probs:
        return out
    return out, as_the_original(lse), signed_probabilities(call)


def as_the_original(lse: Tensor) -> Tensor:
    """lse with +inf for a row that sees nothing, where the native call has -inf."""
    return torch.where(lse == -torch.inf, torch.inf, lse)
