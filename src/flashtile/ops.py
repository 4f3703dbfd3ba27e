"""The torch.library ops `flashtile::forward` and `flashtile::backward`, and the one entry to them.

Compilers, dispatch modes (FLOP counter, selective checkpointing) and tensor subclasses see the ops. A plain eager call
takes the same functions through a bare autograd.Function: the dispatcher would cost as much as the kernel launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashtile import flops
from flashtile.autograd import (
    DIFFERENTIABLE,
    REST,
    Transformed,
    attend,
    gradients,
    needs_dispatcher,
    refuse_second_derivative,
    save,
    transformed,
    wants_gradients,
)
from flashtile.dispatch import requested_backend
from flashtile.execution import empty_gradients, empty_out, run_backward, run_forward
from flashtile.problem import Call, unpack
from flashtile.validation import check

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
    if call.backend is None:
        # Settled here, so that the backward, perhaps in another thread, takes the same backend.
        requested = requested_backend()
        call = call if requested is None else call._replace(backend=requested)
    differentiable = call[:DIFFERENTIABLE]
    if needs_dispatcher(*differentiable) or transformed():
        return _dispatched(call, out)
    if out is None and wants_gradients(*differentiable):
        return attend(call, *differentiable)
    return run_forward(call, out)


def _dispatched(call: Call, out: Tensor | None) -> tuple[Tensor, Tensor]:
    run: Callable[..., tuple[Tensor, Tensor]] = torch.ops.flashtile.forward
    if transformed():
        run = Transformed.apply
    result, lse = run(*call)
    return (result, lse) if out is None else (out.copy_(result), lse)


def _forward_op(*fields: Any) -> tuple[Tensor, Tensor]:
    return run_forward(Call(*fields))


def _backward_op(*arguments: Any) -> tuple[Tensor, ...]:
    return _present(run_backward(*arguments), like=arguments[2])


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:DIFFERENTIABLE]
    return (*gradients(ctx, torch.ops.flashtile.backward, dout, dlse, wanted), *REST)


def _forward_fake(*fields: Any) -> tuple[Tensor, Tensor]:
    call = unpack(Call(*fields))
    problem = check(call)
    return empty_out(call.q, problem), call.q.new_empty(problem.lse_shape, dtype=problem.lse_dtype)


def _backward_fake(dout: Any, dlse: Any, out: Tensor, lse: Any, bias_grad: bool, *fields: Any) -> tuple[Tensor, ...]:
    call = Call(*fields)
    dbias = torch.empty_like(call.bias) if bias_grad and call.bias is not None else None
    dsinks = torch.empty_like(call.sinks) if call.sinks is not None else None
    return _present((*empty_gradients(call), dbias, dsinks), like=out)


def _present(grads: tuple[Tensor | None, ...], like: Tensor) -> tuple[Tensor, ...]:
    """An op returns tensors only: a gradient that the call does not have is an empty one."""
    return tuple(like.new_empty(0) if grad is None else grad for grad in grads)


_library.impl("forward", _forward_op, "CompositeExplicitAutograd")
_library.impl("backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("flashtile::forward", _forward_fake, lib=_library)
torch.library.register_fake("flashtile::backward", _backward_fake, lib=_library)
torch.library.register_autograd("flashtile::forward", _backward, setup_context=save, lib=_library)
torch.library.register_autograd("flashtile::backward", refuse_second_derivative, lib=_library)
flops.register()
