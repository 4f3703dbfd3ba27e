"""Compiles the kernels of a problem for Hopper without one, and reads what the binary needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from flashtile.backends.hopper import (
    backward_epilogue,
    backward_pass,
    backward_prologue,
    descriptors,
    forward_pass,
    launch,
    supports_backward,
)
from flashtile.backends.hopper.backward_kernel import backward_kernel
from flashtile.backends.hopper.forward_kernel import forward_kernel
from flashtile.gpu import arguments, bias_gradient, binary
from flashtile.problem import Call, Problem


class _Launch(NamedTuple):
    """A kernel with stand-ins for its tensors on the meta device."""

    kernel: Any
    boxed: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]
    plan: launch.Plan


def resources(problem: Problem, target_name: str = "sm_90") -> dict[str, binary.Resources]:
    """Compiles every kernel that forward and backward of this problem launch."""
    return {name: binary.read(compiled(name, problem, target_name)) for name in kernels(problem)}


def kernels(problem: Problem) -> list[str]:
    return ["forward"] if supports_backward(problem) else ["forward", "prologue", "backward", "epilogue"]


def compiled(name: str, problem: Problem, target_name: str = "sm_90") -> Any:
    """Triton's CompiledKernel of one of `kernels(problem)`."""
    kernel, boxed, tensors, plan = _launch(name, problem)
    runtime = [parameter.name for parameter in kernel.params if parameter.do_not_specialize]
    found = binary.signature(kernel, plan.describe(boxed), tensors, plan.values, runtime)
    source = (GluonASTSource if boxed else ASTSource)(kernel, found.types, found.constants, found.attributes)
    return triton.compile(source, target=binary.target(target_name), options=plan.options)


def _launch(name: str, problem: Problem) -> _Launch:
    call = binary.meta_call(problem)
    q, k, v = call.q, call.k, call.v
    assert k is not None and v is not None
    out = q.new_empty(problem.out_shape)
    lse = q.new_empty(problem.lse_shape, dtype=torch.float32)
    extras = arguments.extras(call)
    if name == "forward":
        boxed: tuple[Tensor, ...] = (q, k, v, out)
        plan = forward_pass.prepare(problem, call, boxed, ())
        counter = lse.new_empty(1, dtype=torch.int32)
        return _Launch(forward_kernel, boxed, (out, lse, counter, *extras), plan)
    kind = bias_gradient.kind(problem) if problem.bias == "additive" else "none"
    rows = lse.new_empty(2, arguments.scratch_rows(problem))
    accumulated = lse.new_empty(rows.shape[1] * descriptors.width(problem.qk_dim) // 256, 256)
    dbias = _bias_memory(problem, call, kind, rows)
    counters = lse.new_empty(rows.shape[1] // 64, dtype=torch.int32)
    if name == "prologue":
        tensors: tuple[Tensor, ...] = (out, out, lse, lse, rows, accumulated, counters, dbias, rows)
        plan = backward_prologue.prepare(problem, call, (), (kind, False), tensors)
        return _Launch(backward_prologue.prologue_kernel, (), (*tensors, *extras), plan)
    if name == "epilogue":
        tensors = (accumulated, q, k, v)
        plan = backward_epilogue.prepare(problem, call, (), (), tensors)
        return _Launch(backward_epilogue.epilogue_kernel, (), (*tensors, *extras), plan)
    boxed = (q, k, v, out, rows, accumulated, k, v)
    table = q if call.lo is None else call.lo.new_empty(call.lo.shape[0], problem.k_len)
    variant = (kind, table.stride(0) if problem.table and table.shape[0] > 1 else 0)
    plan = backward_pass.prepare(problem, call, boxed, variant)
    return _Launch(backward_kernel, boxed, (table, table, dbias, counters, *extras), plan)


def _bias_memory(problem: Problem, call: Call, kind: str, absent: Tensor) -> Tensor:
    """What the kernels fill with a bias's gradient."""
    if kind == "summed":
        assert problem.bias_shape is not None
        return absent.new_empty(problem.bias_shape)
    dbias = bias_gradient.allocate(problem, call, kind)
    return absent if dbias is None else dbias
