"""The module flash_attn.flash_attn_interface: public functions, and the private names that other software imports.

`_flash_attn_*` are one step each, forward or backward, without gradients of their own; `_wrapped_flash_attn_*` are the
same as operators, `torch.ops.flash_attn.*`, which torch.compile sees. `FlashAttn*Func.apply` takes positional
arguments as the original's autograd functions do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashtile.integrations.flash_attn import raw as flash_attn_gpu
from flashtile.integrations.flash_attn.functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flashtile.integrations.flash_attn.kvcache import flash_attn_with_kvcache

__all__ = [
    "USE_TRITON_ROCM",
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "FlashAttnVarlenKVPackedFunc",
    "FlashAttnVarlenQKVPackedFunc",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]

USE_TRITON_ROCM = False

_ROUNDING = 128
_WHOLE_ROW = 2**30


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x itself where its last dimension lies element by element, else a copy; None stays None."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def round_multiple(x: int, m: int) -> int:
    """x rounded up to a multiple of m."""
    return -(-x // m) * m


def _get_block_size_n(device: object, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys over which S_dmask's running maximum is taken: more than any row has, so it is the row's maximum."""
    return _WHOLE_ROW


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state), see `raw.fwd`."""
    out, softmax_lse, pattern, rng_state = flash_attn_gpu.fwd(
        q, k, v, None, alibi_slopes, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        return_softmax, None,
    )  # fmt: skip
    return out, softmax_lse, pattern, rng_state


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, softmax_lse, S_dmask, rng_state), see `raw.varlen_fwd`."""
    out, softmax_lse, pattern, rng_state = flash_attn_gpu.varlen_fwd(
        q, k, v, None, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, alibi_slopes, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal, window_size_left, window_size_right, softcap,
        return_softmax, None, num_splits,
    )  # fmt: skip
    return out, softmax_lse, pattern, rng_state


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """softmax_d; dq, dk and dv are written where given, see `raw.bwd`."""
    return flash_attn_gpu.bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, deterministic, None, rng_state,
    )[3]  # fmt: skip


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    """softmax_d; dq, dk and dv are written where given, see `raw.varlen_bwd`."""
    return flash_attn_gpu.varlen_bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, alibi_slopes, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, zero_tensors, causal, window_size_left, window_size_right, softcap,
        deterministic, None, rng_state,
    )[3]  # fmt: skip


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, dropout_p, return_softmax = *arguments[:4], arguments[10]
    (batch, q_len, heads, _), k_len = q.shape, k.shape[1]
    lse = q.new_empty((batch, heads, q_len), dtype=torch.float32)
    shape = (batch, heads, round_multiple(q_len, _ROUNDING), round_multiple(k_len, _ROUNDING))
    pattern = q.new_empty(shape if return_softmax and dropout_p > 0 else (0,))
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse, pattern, q.new_empty(2, dtype=torch.int64)


def _fake_varlen_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, _, v, cu_seqlens_q, _, max_seqlen_q, max_seqlen_k, dropout_p = arguments[:8]
    return_softmax = len(arguments) > 14 and arguments[14]
    total, heads, _ = q.shape
    lse = q.new_empty((heads, total), dtype=torch.float32)
    lengths = (round_multiple(max_seqlen_q, _ROUNDING), round_multiple(max_seqlen_k, _ROUNDING))
    shape = (cu_seqlens_q.shape[0] - 1, heads, *lengths)
    pattern = q.new_empty(shape if return_softmax and dropout_p > 0 else (0,))
    return q.new_empty((*q.shape[:-1], v.shape[-1])), lse, pattern, q.new_empty(2, dtype=torch.int64)


def _fake_backward(*arguments: Any) -> Tensor:
    batch, q_len, heads, _ = arguments[1].shape
    return arguments[1].new_empty((batch, heads, round_multiple(q_len, _ROUNDING)), dtype=torch.float32)


def _fake_varlen_backward(*arguments: Any) -> Tensor:
    q, batch = arguments[1], arguments[9].shape[0] - 1
    return q.new_empty((q.shape[1], q.shape[0] + _ROUNDING * batch), dtype=torch.float32)


_NUMBERS = (
    "float dropout_p, float softmax_scale, bool causal, SymInt window_size_left{left}, "
    "SymInt window_size_right{right}, float softcap{softcap}, Tensor? alibi_slopes{slopes}"
)
_REQUIRED = _NUMBERS.format(left="", right="", softcap="", slopes="")
_DEFAULTED = _NUMBERS.format(left="=-1", right="=-1", softcap="=0.0", slopes="=None")
_RESULTS = "(Tensor, Tensor, Tensor, Tensor)"
_STARTS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_GRADS = (
    "Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv"
)
_CHOICES = (
    "bool return_softmax=False, Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, "
    "bool zero_tensors=False, SymInt num_splits=0"
)
_STATE = "bool deterministic, Tensor? rng_state=None"
_OPERATORS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "_flash_attn_forward": (
        f"(Tensor q, Tensor k, Tensor v, {_REQUIRED}, bool return_softmax) -> {_RESULTS}",
        _flash_attn_forward,
        _fake_forward,
    ),
    "_flash_attn_varlen_forward": (
        f"(Tensor q, Tensor k, Tensor v, {_STARTS}, {_DEFAULTED}, {_CHOICES}) -> {_RESULTS}",
        _flash_attn_varlen_forward,
        _fake_varlen_forward,
    ),
    "_flash_attn_backward": (
        f"({_GRADS}, {_REQUIRED}, {_STATE}) -> Tensor",
        _flash_attn_backward,
        _fake_backward,
    ),
    "_flash_attn_varlen_backward": (
        f"({_GRADS}, {_STARTS}, {_REQUIRED}, {_STATE}, bool zero_tensors=False) -> Tensor",
        _flash_attn_varlen_backward,
        _fake_varlen_backward,
    ),
}

_library = torch.library.Library("flash_attn", "FRAGMENT")
for _name, (_schema, _run, _fake) in _OPERATORS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flash_attn::{_name}", _fake, lib=_library)

_wrapped_flash_attn_forward = torch.ops.flash_attn._flash_attn_forward
_wrapped_flash_attn_varlen_forward = torch.ops.flash_attn._flash_attn_varlen_forward
_wrapped_flash_attn_backward = torch.ops.flash_attn._flash_attn_backward
_wrapped_flash_attn_varlen_backward = torch.ops.flash_attn._flash_attn_varlen_backward


def _apply(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """A public function by the original's positional arguments, the last of which says whether gradients are wanted."""
    *arguments_, is_grad_enabled = arguments
    with torch.set_grad_enabled(bool(is_grad_enabled) and torch.is_grad_enabled()):
        return function(*arguments_)


class FlashAttnFunc:
    """apply(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic,
    return_softmax, is_grad_enabled)"""

    @staticmethod
    def apply(*arguments: Any) -> Any:
        return _apply(flash_attn_func, arguments)


class FlashAttnKVPackedFunc:
    """apply(q, kv, dropout_p, ...) and then as FlashAttnFunc"""

    @staticmethod
    def apply(*arguments: Any) -> Any:
        return _apply(flash_attn_kvpacked_func, arguments)


class FlashAttnQKVPackedFunc:
    """apply(qkv, dropout_p, ...) and then as FlashAttnFunc"""

    @staticmethod
    def apply(*arguments: Any) -> Any:
        return _apply(flash_attn_qkvpacked_func, arguments)


class FlashAttnVarlenFunc:
    """apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
    window_size, softcap, alibi_slopes, deterministic, return_softmax, block_table, is_grad_enabled)"""

    @staticmethod
    def apply(*arguments: Any) -> Any:
        return _apply(flash_attn_varlen_func, arguments)


class FlashAttnVarlenKVPackedFunc:
    """apply(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, ...), then as FlashAttnFunc"""

    @staticmethod
    def apply(*arguments: Any) -> Any:
        return _apply(flash_attn_varlen_kvpacked_func, arguments)


class FlashAttnVarlenQKVPackedFunc:
    """apply(qkv, cu_seqlens, max_seqlen, dropout_p, ...) and then as FlashAttnFunc"""

    @staticmethod
    def apply(*arguments: Any) -> Any:
        return _apply(flash_attn_varlen_qkvpacked_func, arguments)
