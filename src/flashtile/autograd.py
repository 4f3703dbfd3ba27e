"""Derivatives of attention: what is saved, and how the gradients come back on each of three ways.

- `Attention`, for plain eager calls: forward and backward run at once, without PyTorch's dispatcher between.
- The torch.library ops (flashtile.ops), for compilers, dispatch modes and tensor subclasses.
- `Transformed`, for torch.func (grad, vmap, jacrev ...), around the ops. Its vmap folds the mapped dimension into the
  batch where the call allows it, and otherwise maps in a loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from flashtile.execution import forward, run_backward
from flashtile.problem import Call, unpack
from flashtile.validation import describe

# The leading fields of Call that gradients are counted for: q, k, v, bias, alibi_slopes, sinks.
DIFFERENTIABLE: Final = 6
TENSORS = 11  # the leading fields of Call that are tensors
REST = (None,) * (len(Call._fields) - DIFFERENTIABLE)
_PLAIN = (Tensor, torch.nn.Parameter)
_SAVED = 5  # dout, dlse, out, lse and bias_grad come before the call's fields in a backward


def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keeps the call and its result for the backward; the attention matrix is recomputed from lse."""
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:TENSORS], *output)
    ctx.numbers = inputs[TENSORS:]


def gradients(
    ctx: Any, run: Callable[..., Any], dout: Tensor | None, dlse: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of the call's first six fields, None where not wanted.

    run: run_backward, or the same thing behind the dispatcher.
    """
    *tensors, out, lse = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * DIFFERENTIABLE
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dbias, dsinks = run(dout, dlse, out, lse, bool(wanted[3]), *tensors, *ctx.numbers)
    return (
        dq if wanted[0] else None,
        dk if wanted[1] else None,
        dv if wanted[2] else None,
        dbias if wanted[3] else None,
        None,
        dsinks if wanted[5] else None,
    )


def refuse_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "flashtile: got a request for the gradient of attention's gradient, expected first derivatives only; "
        "write this attention as matmul, softmax, matmul to differentiate it twice"
    )


def needs_dispatcher(*tensors: Tensor | None) -> bool:
    """True where somebody looks on: a compiler, a dispatch mode, or a tensor that is not a plain one."""
    if torch.compiler.is_compiling():
        return True
    for tensor in tensors:  # a loop takes half the time of any(...)
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta):
            return True
    return torch._C._len_torch_dispatch_stack() > 0


def wants_gradients(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def transformed() -> bool:
    """True inside torch.func's transforms and forward-mode AD (which `Transformed` refuses where it is asked for)."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0
    )


class Attention(torch.autograd.Function):
    """The eager way. Each argument costs time, so the call comes whole and only what may have gradients beside it."""

    @staticmethod
    def forward(ctx: Any, call: Call, *differentiable: Tensor | None) -> tuple[Tensor, Tensor]:
        unpacked = unpack(call)
        ctx.problem = describe(unpacked)
        output = forward(ctx.problem, unpacked)
        save(ctx, call, output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        # With create_graph the op puts its own refusal of a second derivative into the graph.
        dispatched = torch.is_grad_enabled() or needs_dispatcher(dout, dlse)
        # PyTorch wants sizes, dtypes and devices back from hooks on saved tensors, so the problem is the same.
        run = torch.ops.flashtile.backward if dispatched else partial(run_backward, problem=ctx.problem)
        return (None, *gradients(ctx, run, dout, dlse, ctx.needs_input_grad[1:]))


# Python's `Attention.apply` first looks for the transforms of torch.func, which `transformed` has found to be away.
attend: Callable[..., tuple[Tensor, Tensor]] = super(torch.autograd.Function, Attention).apply


class Transformed(torch.autograd.Function):
    """The way of torch.func's transforms."""

    @staticmethod
    def forward(*fields: Any) -> tuple[Tensor, Tensor]:
        return torch.ops.flashtile.forward(*fields)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*gradients(ctx, TransformedBackward.apply, dout, dlse, ctx.needs_input_grad[:DIFFERENTIABLE]), *REST)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *fields: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _map(Transformed, 0, info.batch_size, in_dims, fields)


class TransformedBackward(torch.autograd.Function):
    """The backward of `Transformed`, itself open to vmap (per-sample gradients), closed to a second derivative."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return torch.ops.flashtile.backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Nothing to keep: there is no second derivative."""

    backward = staticmethod(refuse_second_derivative)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _map(TransformedBackward, _SAVED, info.batch_size, in_dims, arguments)


def _map(
    function: Any, leading: int, size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """function over `size` slices of its arguments; the call's fields begin after `leading` ones."""
    foldable = leading + 3  # all before are batched tensors; of those after it none may be mapped
    call = Call(*arguments[leading:])
    rest = (call.bias, call.sinks, call.cu_seqlens_q, call.rng)
    per_batch = (call.alibi_slopes is not None and call.alibi_slopes.ndim > 1) or (
        call.lo is not None and call.lo.shape[0] > 1
    )
    if any(d is not None for d in in_dims[foldable:]) or any(t is not None for t in rest) or per_batch:
        results = _in_a_loop(function, size, in_dims, arguments)
    else:
        folded = (
            _fold(t, dim, size) if isinstance(t, Tensor) else t
            for t, dim in zip(arguments[:foldable], in_dims, strict=False)
        )
        results = [_unfold(t, size) for t in function.apply(*folded, *arguments[foldable:])]
    return tuple(results), (0,) * len(results)


def _in_a_loop(function: Any, size: int, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]) -> list[Tensor]:
    slices = (
        function.apply(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
        for i in range(size)
    )
    return [torch.stack(parts) for parts in zip(*slices, strict=True)]


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """[size, batch, ...] as [size * batch, ...]"""
    mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return mapped.flatten(0, 1)


def _unfold(tensor: Tensor, size: int) -> Tensor:
    if tensor.ndim == 1:  # a gradient that the call does not have
        return tensor.expand(size, *tensor.shape)
    return tensor.unflatten(0, (size, tensor.shape[0] // size))
