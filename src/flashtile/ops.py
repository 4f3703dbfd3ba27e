"""The torch.library ops `flashtile::forward` and `flashtile::backward`, and the thin eager path beside them.

Compilers, dispatch modes (FLOP counter, selective checkpointing) and tensor subclasses see the ops. A plain eager call
takes the same two functions through a bare autograd.Function: the dispatcher would cost as much as the kernel launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from flashtile.dispatch import choose, load, requested_backend
from flashtile.merge import sink_gradient
from flashtile.problem import Call, Problem, unpack
from flashtile.validation import check, check_cu_seqlens_values, describe

_TENSORS = 11  # the leading fields of Call that are tensors
_CALL = (
    "Tensor q, Tensor? k, Tensor? v, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? lo, Tensor? hi, Tensor? rng, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "SymInt? window_left, SymInt? window_right, float scale, float softcap, float dropout_p, bool deterministic, "
    "str? backend"
)
_SAVED = "Tensor dout, Tensor? dlse, Tensor out, Tensor lse, bool bias_grad"

_library = torch.library.Library("flashtile", "DEF")
_library.define(f"forward({_CALL}) -> (Tensor out, Tensor lse)", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    f"backward({_SAVED}, {_CALL}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attention(call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call, differentiable; `out` is written in place where given."""
    if torch.compiler.is_compiling() or _needs_dispatcher(call.q):
        result, lse = torch.ops.flashtile.forward(*call)
        return (result, lse) if out is None else (out.copy_(result), lse)
    if call.backend is None:
        call = call._replace(backend=requested_backend())
    if out is None and torch.is_grad_enabled() and any(_wants_grad(call)):
        return _Attention.apply(*call)  # type: ignore[no-untyped-call]
    return run_forward(call, out)


def _needs_dispatcher(q: Tensor) -> bool:
    return (
        type(q) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _wants_grad(call: Call) -> tuple[bool, ...]:
    return tuple(t is not None and t.requires_grad for t in call[:6])


def run_forward(call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Checks, chooses a backend and runs it."""
    call = unpack(call)
    problem = describe(call)
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None and problem.device == "cpu":
        check_cu_seqlens_values("cu_seqlens_q", call.cu_seqlens_q, problem.total_q, problem.q_len)
        check_cu_seqlens_values("cu_seqlens_k", call.cu_seqlens_k, problem.total_k, problem.k_len)
    if problem.empty:
        return _forward_of_nothing(problem, call, out)
    return load(choose(problem, call.backend)).forward(problem, call, out)


def run_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, bias_grad: bool, *fields: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v (packed as the inputs were), bias and sinks; absent ones are empty tensors."""
    packed = Call(*fields)
    grads = _empty_gradients(packed)
    call = unpack(packed)
    views = unpack(call._replace(q=grads[0], k=grads[1], v=grads[2]))
    problem = describe(call)
    if problem.empty:
        dbias, dsinks = _backward_of_nothing(problem, call, lse, dlse, (views.q, views.k, views.v), bias_grad)
    else:
        backend = load(choose(problem, call.backend))
        dqkv = (views.q, views.k, views.v)
        dbias, dsinks = backend.backward(problem, call, out, lse, dout, dlse, dqkv, bias_grad)
    absent = out.new_empty(0)
    return tuple(t if t is not None else absent.clone() for t in (*grads, dbias, dsinks))  # type: ignore[return-value]


def _empty_gradients(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dq, dk, dv = (None if t is None else torch.empty_like(t) for t in call[:3])
    return dq, dk, dv  # type: ignore[return-value]


def _forward_of_nothing(problem: Problem, call: Call, out: Tensor | None) -> tuple[Tensor, Tensor]:
    out = call.q.new_empty(problem.out_shape) if out is None else out
    lse = call.q.new_full(problem.lse_shape, -torch.inf, dtype=problem.lse_dtype)
    if call.sinks is not None and not problem.varlen:
        lse.copy_(call.sinks[None, :, None].expand_as(lse))
    elif call.sinks is not None:
        lse.copy_(call.sinks[:, None].expand_as(lse))
    return out.zero_(), lse


def _backward_of_nothing(
    problem: Problem, call: Call, lse: Tensor, dlse: Tensor | None, grads: tuple[Tensor, ...], bias_grad: bool
) -> tuple[Tensor | None, Tensor | None]:
    for grad in grads:
        grad.zero_()
    dbias = torch.zeros_like(call.bias) if bias_grad and call.bias is not None else None
    if call.sinks is None:
        return dbias, None
    delta = torch.zeros_like(lse) if dlse is None else -dlse
    return dbias, sink_gradient(call.sinks, lse, delta)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.numbers = inputs[_TENSORS:]


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * (_TENSORS + len(ctx.numbers))
    dout = torch.zeros_like(out) if dout is None else dout
    arguments = (dout, dlse, out, lse, bool(ctx.needs_input_grad[3]), *tensors, *ctx.numbers)
    through_op = torch.compiler.is_compiling() or _needs_dispatcher(dout)
    dq, dk, dv, dbias, dsinks = (torch.ops.flashtile.backward if through_op else run_backward)(*arguments)
    grads = (dq, dk, dv, dbias, None, dsinks)
    wanted = (g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False))
    return (*wanted, *(None,) * (_TENSORS - 6 + len(ctx.numbers)))


class _Attention(torch.autograd.Function):
    """The eager path: the ops' own forward and backward without the dispatcher between."""

    @staticmethod
    def forward(ctx: Any, *fields: Any) -> tuple[Tensor, Tensor]:
        output = run_forward(Call(*fields))
        _setup_context(ctx, fields, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dout, dlse)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("flashtile: the gradient of attention's gradient is not available; use backend-free math")


def _forward_op(*fields: Any) -> tuple[Tensor, Tensor]:
    return run_forward(Call(*fields))


def _forward_fake(*fields: Any) -> tuple[Tensor, Tensor]:
    problem = check(unpack(Call(*fields)))
    q = fields[0]
    return q.new_empty(problem.out_shape), q.new_empty(problem.lse_shape, dtype=problem.lse_dtype)


def _backward_fake(dout: Any, dlse: Any, out: Tensor, lse: Tensor, bias_grad: bool, *fields: Any) -> tuple[Tensor, ...]:
    call = Call(*fields)
    absent = out.new_empty(0)
    grads = _empty_gradients(call)
    dbias = torch.empty_like(call.bias) if bias_grad and call.bias is not None else None
    dsinks = torch.empty_like(call.sinks) if call.sinks is not None else None
    return tuple(absent.clone() if t is None else t for t in (*grads, dbias, dsinks))


_library.impl("forward", _forward_op, "CompositeExplicitAutograd")
_library.impl("backward", run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("flashtile::forward", _forward_fake, lib=_library)
torch.library.register_fake("flashtile::backward", _backward_fake, lib=_library)
torch.library.register_autograd("flashtile::forward", _backward, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("flashtile::backward", _no_second_derivative, lib=_library)


def _products(q: Any, k: Any, v: Any, max_seqlen_q: int | None, max_seqlen_k: int | None) -> tuple[int, int]:
    """Multiply-adds of S = Q K^T and of O = P V, counted as PyTorch's own attention formulas do: no mask deducted."""
    if k is None:
        *rows, _, heads, dim = q
        k_rows, v_dim = rows, dim
    else:
        *rows, heads, dim = q
        k_rows = k[:-2] if v is not None else k[:-3]
        v_dim = v[-1] if v is not None else k[-1]
    if max_seqlen_q is None:
        batch, q_len, k_len = rows[0], rows[1], k_rows[1]
        pairs = batch * heads * q_len * k_len
    else:
        # Packed sequences: every query is counted with the longest key length, an upper bound.
        pairs = heads * rows[0] * min(max_seqlen_k or 0, k_rows[0])
    return pairs * dim, pairs * v_dim


@register_flop_formula(torch.ops.flashtile.forward)
def _forward_flops(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **kwargs: Any) -> int:
    scores, values = _products(q, k, v, *rest[8:10])
    return 2 * (scores + values)


@register_flop_formula(torch.ops.flashtile.backward)
def _backward_flops(
    dout: Any, dlse: Any, out: Any, lse: Any, bias_grad: Any, q: Any, k: Any, v: Any, *rest: Any, **kwargs: Any
) -> int:
    """S again, dQ and dK from dS, dP and dV: three products of the score kind, two of the value kind."""
    scores, values = _products(q, k, v, *rest[8:10])
    return 2 * (3 * scores + 2 * values)
