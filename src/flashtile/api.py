"""The native calls, `attention` and `attention_varlen`: they bring arguments into one form, `validation` checks it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from flashtile import masks, ops
from flashtile.dispatch import BACKENDS
from flashtile.dropout import draw
from flashtile.problem import Call, default_scale
from flashtile.validation import check_is_tensor, check_layout, check_out, check_types, fail, varlen_lengths

Window = Sequence[int | None] | Tensor

_CAUSAL = masks.Causal()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: masks.Mask | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, softmax(score(Q K^T)) V, in memory linear in sequence length.

    The score of a query row i and a key j is `softcap(scale * q_i . k_j) + alibi + bias`, -inf where the mask hides j.
    Differentiable in q, k, v, bias and sinks, and through the returned lse.

    Args:
        q: (batch, q_len, heads, head_dim), or (batch, q_len, head_dim) for one head; head_dim 1 to 256.
        k: (batch, k_len, kv_heads, head_dim); kv_heads divides heads (grouped-query attention). 3-D as q.
        v: (batch, k_len, kv_heads, v_dim); v_dim 1 to 256 may differ from head_dim. 3-D as q.
        mask: a mask of `flashtile.masks`; causal and window below are intersected with it. Default: none.
        causal: row i sees keys up to its own position; the last row stands at the last key (bottom-right).
        window: (left, right) keys seen before and after the own position, inclusive; None or -1 is unlimited.
        scale: factor of the scores; default 1 / sqrt(head_dim).
        softcap: scores become softcap * tanh(score / softcap); 0 is off (Gemma 2, arXiv 2408.00118, section 2).
        alibi_slopes: (heads,) or (batch, heads): adds -slope * |i + k_len - q_len - j| (Press et al. 2022, section 3).
            It has no gradient.
        bias: broadcastable to (batch, heads, q_len, k_len); boolean (True is seen) or added to the scores.
        sinks: (heads,): one learned logit per head that joins the softmax and carries no value (Xiao et al. 2024;
            as in gpt-oss).
        dropout_p: probability of dropping an attention weight; the kept ones are scaled by 1 / (1 - dropout_p).
        return_lse: also return the logarithm of each row's softmax denominator.
        deterministic: ask for a bitwise repeatable backward; default: torch.are_deterministic_algorithms_enabled().
        out: written in place and returned; not with gradients.
        backend: "hopper", "triton", "blocked" or "reference", obeyed or refused; default: the first that can serve.

    Returns:
        out, (batch, q_len, heads, v_dim) in q's dtype, its dimensions in memory in q's order; with return_lse also lse,
        (batch, heads, q_len), float32 (float64 for float64 inputs), natural logarithm. A row that sees no key gives
        0 and -inf. 3-D inputs give (batch, q_len, v_dim) and (batch, q_len).

    Raises:
        TypeError, ValueError: a bad argument, before anything is launched; the message says got and expected.
        NotImplementedError: no backend (or not the one asked for) can serve the call; with the reasons.

    Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691), sections 3.1 and 3.2.

    >>> import torch, flashtile
    >>> q = k = v = torch.randn(1, 128, 4, 64)
    >>> flashtile.attention(q, k, v, causal=True).shape
    torch.Size([1, 128, 4, 64])
    """
    for name, value in (("q", q), ("k", k), ("v", v)):
        check_is_tensor(name, value)
    one_head = q.ndim == k.ndim == v.ndim == 3
    if one_head:
        q, k, v = q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2)
    call = Call(q, k, v, bias, alibi_slopes, sinks, softcap=softcap, dropout_p=dropout_p, backend=backend)
    call = prepare(call, combine(mask, causal, window), scale, deterministic)
    if out is not None:
        out = out.unsqueeze(2) if one_head and isinstance(out, Tensor) and out.ndim == 3 else out
        check_out(out, call, (*q.shape[:-1], v.shape[-1]))
    result, lse = ops.attention(call, out)
    if one_head:
        result, lse = result.squeeze(2), lse.squeeze(1)
    return (result, lse) if return_lse else result


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    mask: masks.Mask | None = None,
    causal: bool = False,
    window: Window | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over sequences of different lengths that are packed end to end; no padding is computed.

    Args:
        q: (total_q, heads, head_dim), or (total_q, head_dim) for one head.
        k, v: (total_k, kv_heads, head_dim) and (total_k, kv_heads, v_dim).
        cu_seqlens_q: int32 (batch + 1,), starts of the sequences and the end of the last; empty sequences are fine.
            Rows past the last end are not computed: their out and gradients are 0, their lse -inf.
        cu_seqlens_k: the same for keys; default cu_seqlens_q.
        max_seqlen_q, max_seqlen_k: the longest sequence; default total_q and total_k, which is right but lets a GPU
            start tiles that find no work. On a CPU the contents of cu_seqlens are checked before the call; on a GPU
            the kernels check them while they run, never read out of bounds, and the error is raised by the next
            flashtile call on that device or by `flashtile.check_device_errors`.
        alibi_slopes: (heads,) or (batch, heads). bias: broadcastable to (batch, heads, max_seqlen_q, max_seqlen_k),
            indexed by positions within the sequence.
        The other arguments: as `attention`; masks are aligned per sequence.

    Returns:
        out, (total_q, heads, v_dim); with return_lse also lse, (heads, total_q), float32 (float64 for float64 inputs).
        2-D inputs give (total_q, v_dim) and (total_q,).

    Raises:
        TypeError, ValueError, NotImplementedError: as `attention`.

    Source: FlashAttention-2 (Dao 2023), section 3; the interface is that of flash_attn_varlen_func.
    """
    for name, value in (("q", q), ("k", k), ("v", v), ("cu_seqlens_q", cu_seqlens_q)):
        check_is_tensor(name, value)
    one_head = q.ndim == k.ndim == v.ndim == 2
    if one_head:
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
    max_seqlen_q = q.shape[0] if max_seqlen_q is None else max_seqlen_q
    max_seqlen_k = k.shape[0] if max_seqlen_k is None else max_seqlen_k
    call = Call(
        q,
        k,
        v,
        bias,
        alibi_slopes,
        sinks,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        softcap=softcap,
        dropout_p=dropout_p,
        backend=backend,
    )
    call = prepare(call, combine(mask, causal, window), scale, deterministic)
    if out is not None:
        out = out.unsqueeze(1) if one_head and isinstance(out, Tensor) and out.ndim == 2 else out
        check_out(out, call, (*q.shape[:-1], v.shape[-1]))
    result, lse = ops.attention(call, out)
    if one_head:
        result, lse = result.squeeze(1), lse.squeeze(0)
    return (result, lse) if return_lse else result


def combine(mask: masks.Mask | None, causal: bool, window: Window | None) -> masks.Mask | None:
    """The intersection of the three ways to say a mask; None where all keys are seen."""
    if mask is not None and not isinstance(mask, masks.Mask):
        fail("mask", type(mask).__name__, "a mask of flashtile.masks; a tensor goes to bias", TypeError)
    if not isinstance(causal, bool):
        fail("causal", type(causal).__name__, "a bool", TypeError)
    if causal:
        mask = _CAUSAL if mask is None else mask & _CAUSAL
    if window is not None:
        band = masks.Window(*_sides(window))
        mask = band if mask is None else mask & band
    return mask


def _sides(window: Window) -> tuple[int | None, int | None]:
    if isinstance(window, Tensor):
        window = window.tolist()
    if not isinstance(window, (tuple, list)):
        fail("window", type(window).__name__, "a pair (left, right)", TypeError)
    if len(window) != 2:
        fail("window", f"{len(window)} values", "a pair (left, right)")
    for side in window:
        if side is not None and (isinstance(side, bool) or not isinstance(side, (Integral, torch.SymInt))):
            fail("window", f"{type(side).__name__} {side!r}", "ints or None", TypeError)
        if side is not None and side < -1:
            fail("window", tuple(window), "0 or more keys on a side, None or -1 for unlimited")
    left, right = (None if side is None or side == -1 else _as_int(side) for side in window)
    return left, right


def _as_int(side: Any) -> Any:
    return side if isinstance(side, (int, torch.SymInt)) else int(side)  # NumPy has integers of its own


def prepare(call: Call, mask: masks.Mask | None, scale: float | None, deterministic: bool | None) -> Call:
    """A call as the ops want it: defaults filled in, mask lowered, autocast applied, dropout's random state drawn.

    q, k and v may be packed. The caller's own forms of scale, mask and deterministic come beside the call.
    """
    check_layout(call)
    if call.backend is not None and call.backend not in BACKENDS:
        fail("backend", repr(call.backend), f"one of {', '.join(map(repr, BACKENDS))}")
    q, k, v, bias = call[:4]
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    scale = default_scale(q.shape[-1]) if scale is None else scale
    scale, softcap, dropout_p = check_types(call, scale, deterministic)
    lowered = masks.UNMASKED if mask is None else _lower(mask, call)
    if not q.is_meta and torch.is_autocast_enabled(q.device.type):
        q, k, v, bias = _autocast(q.device.type, q, k, v, bias)
    return Call(  # positional: by keyword it takes three times as long, and every call comes through here
        q,
        k,
        v,
        bias,
        call.alibi_slopes,
        call.sinks,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        lowered.lo,
        lowered.hi,
        draw(q.device) if dropout_p > 0 else None,
        call.max_seqlen_q,
        call.max_seqlen_k,
        lowered.left,
        lowered.right,
        scale,
        softcap,
        dropout_p,
        deterministic,
        call.backend,
    )


def _lower(mask: masks.Mask, call: Call) -> masks.Lowered:
    distances = mask.distances()
    if distances is not None:
        return masks.Lowered(*distances)
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        keys = call.q if call.k is None else call.k
        return masks.lower(mask, call.q.shape[1], keys.shape[1], call.q.device)
    q_len = varlen_lengths(call)[1]
    return masks.lower_varlen(mask, call.cu_seqlens_q, call.cu_seqlens_k, q_len)


def _autocast(device: str, *tensors: Any) -> list[Any]:
    """Floating tensors but float64 ones in autocast's dtype, as torch's own scaled_dot_product_attention has them."""
    dtype = torch.get_autocast_dtype(device)
    eligible = (torch.float16, torch.bfloat16, torch.float32)
    return [t.to(dtype) if isinstance(t, Tensor) and t.dtype in eligible else t for t in tensors]


def renamed(error: Exception, names: Mapping[str, str]) -> Exception:
    """The same error in the argument names of a foreign signature."""
    return type(error)(re.sub(r"\b[a-z_]+\b", lambda word: names.get(word[0], word[0]), str(error)))
