"""What flash_attn's compiled module, flash_attn_2_cuda, offers: fwd, bwd, varlen_fwd, varlen_bwd, fwd_kvcache.

The arguments and their order are those of flash_attn 2.8's C++ functions; software that drives attention step by step
(ring attention, its own autograd.Function) calls them. Nothing here is differentiable or touched by autocast.

- `gen` was a random generator; it is no longer supported and raises RuntimeError where given.
- softmax_lse is +inf for a row that sees nothing. rng_state is dropout's (seed, offset), int64 (2,).
- dq, dk, dv are written where given, of any strides; None stands for new memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile.api import combine, prepare, renamed
from flashtile.execution import write_gradients
from flashtile.integrations.flash_attn.dropout_pattern import signed_probabilities
from flashtile.integrations.flash_attn.functions import (
    as_length,
    as_the_original,
    check_num_splits,
    check_tensors,
    from_pages,
)
from flashtile.integrations.flash_attn.kvcache import flash_attn_with_kvcache
from flashtile.kvcache import packed_in_use
from flashtile.ops import attention as attend
from flashtile.problem import Call
from flashtile.validation import check_is_tensor, check_out, fail

_NAMES = {"scale": "softmax_scale", "window": "window_size", "dropout_p": "p_dropout"}
_ROUNDING = 128


class _Numbers(NamedTuple):
    """The numbers of a call as these functions have them."""

    p_dropout: float
    softmax_scale: float | None
    is_causal: bool
    window_size_left: int
    window_size_right: int
    softcap: float
    deterministic: bool = False


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """No gradients, no autocast, errors in these functions' argument names."""

    @wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        first = arguments[0] if arguments else None
        device = first.device.type if isinstance(first, Tensor) and not first.is_meta else "cpu"
        try:
            with torch.no_grad(), torch.autocast(device, enabled=False):
                return function(*arguments, **keywords)
        except (TypeError, ValueError) as error:
            raise renamed(error, _NAMES) from None

    return run


@_plainly
def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float | None,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: object | None = None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of dense q (batch, q_len, heads, head_dim), k and v.

    S_dmask is empty without return_softmax or without dropout.
    """
    _refuse_generator(gen)
    check_tensors(k=k, v=v)
    numbers = _Numbers(p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap)
    return _forward(Call(q, k, v, alibi_slopes=alibi_slopes), numbers, out, return_softmax, False)


@_plainly
def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float | None,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: object | None = None,
    num_splits: int = 0,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of packed sequences.

    seqused_k: int32 (batch,), keys in use of each sequence. leftpad_k: int32 (batch,), keys at its start that are not
    seen. block_table: as `flash_attn_varlen_func`. Rows behind the last sequence have out 0 and softmax_lse +inf, or
    -inf with zero_tensors. num_splits: as `flash_attn_with_kvcache`.
    """
    _refuse_generator(gen)
    check_tensors(k=k, v=v, cu_seqlens_q=cu_seqlens_q)
    check_num_splits(num_splits)
    if block_table is not None:
        k, v, cu_seqlens_k = from_pages(k, v, block_table, cu_seqlens_k, leftpad_k, seqused_k)
    elif leftpad_k is not None or seqused_k is not None:
        k, v, cu_seqlens_k = packed_in_use(k, v, cu_seqlens_k, leftpad_k, seqused_k)
    call = Call(q, k, v, None, alibi_slopes, None, cu_seqlens_q, cu_seqlens_k)
    call = call._replace(max_seqlen_q=as_length(max_seqlen_q), max_seqlen_k=as_length(max_seqlen_k))
    numbers = _Numbers(p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap)
    return _forward(call, numbers, out, return_softmax, zero_tensors)


def _forward(
    call: Call, numbers: _Numbers, out: Tensor | None, return_softmax: bool, zero_tensors: bool
) -> list[Tensor]:
    call = _prepared(call._replace(dropout_p=numbers.p_dropout), numbers)
    if out is not None:
        check_out(out, call, (*call.q.shape[:-1], call.v.shape[-1]))
    result, lse = attend(call, out)
    softmax_lse = as_the_original(lse)
    if zero_tensors and call.cu_seqlens_q is not None:
        behind = torch.arange(lse.shape[-1], device=lse.device) >= call.cu_seqlens_q[-1]
        softmax_lse = softmax_lse.masked_fill(behind, -torch.inf)
    pattern = signed_probabilities(call) if return_softmax else call.q.new_empty(0)
    rng_state = torch.zeros(2, dtype=torch.int64, device=call.q.device) if call.rng is None else call.rng
    return [result, softmax_lse, pattern, rng_state]


@_plainly
def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float | None,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: object | None = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d] from what `fwd` returned.

    softmax_d: float32 (batch, heads, q_len rounded up to 128), rowsum(dout * out) * (1 - p_dropout), 0 behind q_len.
    """
    _refuse_generator(gen)
    check_tensors(k=k, v=v)
    numbers = _Numbers(p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap, deterministic)
    call = Call(q, k, v, alibi_slopes=alibi_slopes)
    grads, delta = _backward(call, numbers, (dout, out, softmax_lse), (dq, dk, dv), rng_state)
    q_len = q.shape[1]
    return [*grads, torch.nn.functional.pad(delta, (0, -q_len % _ROUNDING))]


@_plainly
def varlen_bwd(
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
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float | None,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: object | None = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d] from what `varlen_fwd` returned, for keys that lie end to end.

    Gradients of rows behind the last sequence are 0, with and without zero_tensors.
    softmax_d: float32 (heads, total_q + 128 * batch): sequence b begins at cu_seqlens_q[b] + 128 * b, rounded down to
    a multiple of 128.
    """
    _refuse_generator(gen)
    check_tensors(k=k, v=v, cu_seqlens_q=cu_seqlens_q)
    numbers = _Numbers(p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap, deterministic)
    call = Call(q, k, v, None, alibi_slopes, None, cu_seqlens_q, cu_seqlens_k)
    call = call._replace(max_seqlen_q=as_length(max_seqlen_q), max_seqlen_k=as_length(max_seqlen_k))
    grads, delta = _backward(call, numbers, (dout, out, softmax_lse), (dq, dk, dv), rng_state)
    return [*grads, _spread(delta, cu_seqlens_q)]


def _backward(
    call: Call,
    numbers: _Numbers,
    results: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    rng_state: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """(dq, dk, dv) and rowsum(dout * out) * (1 - p_dropout) in softmax_lse's shape; results: dout, out, softmax_lse."""
    dout, out, softmax_lse = results
    check_tensors(dout=dout, out=out, softmax_lse=softmax_lse)
    call = _prepared(call, numbers)  # without dropout: the forward has drawn its state already
    if numbers.p_dropout > 0:
        if not isinstance(rng_state, Tensor) or rng_state.dtype != torch.int64 or tuple(rng_state.shape) != (2,):
            fail("rng_state", type(rng_state).__name__, "the forward's rng_state, int64 (2,), with p_dropout > 0")
        call = call._replace(rng=rng_state, dropout_p=float(numbers.p_dropout))
    for name, tensor, like in (("dout", dout, out), ("out", out, call.q)):
        if tensor.shape[:-1] != like.shape[:-1] or tensor.shape[-1] != call.v.shape[-1] or tensor.dtype != call.q.dtype:
            wanted = f"{call.q.dtype} {(*like.shape[:-1], call.v.shape[-1])}"
            fail(name, f"{tensor.dtype} {tuple(tensor.shape)}", wanted)
    written = _gradients(grads, call)
    lse = torch.where(softmax_lse == torch.inf, -torch.inf, softmax_lse)
    write_gradients(dout, None, out, lse, False, call, written)
    delta = (dout.float() * out.float()).sum(-1).transpose(-1, -2) * (1 - numbers.p_dropout)
    return written, delta


def _gradients(grads: tuple[Tensor | None, ...], call: Call) -> tuple[Tensor, Tensor, Tensor]:
    written = []
    for name, grad, tensor in zip(("dq", "dk", "dv"), grads, call[:3], strict=True):
        if grad is None:
            grad = torch.empty_like(tensor)
        check_is_tensor(name, grad)
        if grad.shape != tensor.shape or grad.dtype != tensor.dtype or grad.device != tensor.device:
            got, wanted = (f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in (grad, tensor))
            fail(name, got, f"{wanted}, as {name[1]}")
        written.append(grad)
    dq, dk, dv = written
    return dq, dk, dv


def _spread(delta: Tensor, cu_seqlens_q: Tensor) -> Tensor:
    """Packed rows (heads, total_q) where the original has them; without a wait for the device."""
    heads, total = delta.shape
    batch = cu_seqlens_q.shape[0] - 1
    result = delta.new_zeros(heads, total + _ROUNDING * batch)
    if batch == 0 or total == 0:
        return result
    row = torch.arange(total, device=delta.device, dtype=torch.int32)
    sequence = torch.searchsorted(cu_seqlens_q[1:], row, right=True).clamp(max=batch - 1)
    first = cu_seqlens_q[sequence].long()
    place = row - first + (first + _ROUNDING * sequence) // _ROUNDING * _ROUNDING
    inside = row < cu_seqlens_q[-1]
    # Rows of no sequence are written, as 0, to the last place, which belongs to padding.
    place = torch.where(inside, place, result.shape[1] - 1)
    return result.index_add_(1, place, torch.where(inside, delta, 0.0))


def fwd_kvcache(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seqlens_k: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
    softmax_scale: float | None,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[Tensor]:
    """[out, softmax_lse] of `flash_attn_with_kvcache`, whose arguments these are; `out` is written where given."""
    result, lse = flash_attn_with_kvcache(
        q, kcache, vcache, k, v, rotary_cos, rotary_sin, seqlens_k, cache_batch_idx, leftpad_k, block_table,
        softmax_scale, is_causal, (window_size_left, window_size_right), softcap, is_rotary_interleaved, alibi_slopes,
        num_splits, return_softmax_lse=True,
    )  # fmt: skip
    if out is None:
        return [result, lse]
    with torch.no_grad():
        check_out(out, Call(q, kcache, vcache), tuple(result.shape))
        return [out.copy_(result), lse]


def _prepared(call: Call, numbers: _Numbers) -> Call:
    mask = combine(None, numbers.is_causal, (numbers.window_size_left, numbers.window_size_right))
    call = call._replace(softcap=numbers.softcap)
    return prepare(call, mask, numbers.softmax_scale, numbers.deterministic or None)


def _refuse_generator(gen: object | None) -> None:
    if gen is not None:
        raise RuntimeError("gen: got a random generator, expected None; torch.manual_seed rules dropout")
