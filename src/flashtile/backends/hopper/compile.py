"""Compiles the kernels of a problem for Hopper without one, and reads what the binary needs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from flashtile.backends.hopper import (
    backward_configs,
    backward_epilogue,
    backward_pass,
    backward_prologue,
    forward_pass,
    launch,
)
from flashtile.backends.hopper.backward_kernel import backward_kernel
from flashtile.backends.hopper.forward_kernel import forward_kernel
from flashtile.gpu import arguments, bias_gradient, binary
from flashtile.problem import Problem


def kernels(problem: Problem) -> tuple[str, ...]:
    """Names of the kernels of a problem."""
    launches = backward_configs.launches(problem)
    after = [] if any(one.errand == "dq" for one in launches) else ["epilogue"]
    return ("forward", "prologue", *(one.name for one in launches), *after)


class _Launch(NamedTuple):
    """A kernel with stand-ins for its tensors on the meta device."""

    kernel: Any
    boxed: tuple[Tensor, ...]
    tensors: tuple[Tensor, ...]
    plan: launch.Plan


def resources(problem: Problem, target_name: str = "sm_90") -> dict[str, binary.Resources]:
    """Compiles the kernels of a problem."""
    return {name: binary.read(compiled(name, problem, target_name)) for name in kernels(problem)}


def compiled(name: str, problem: Problem, target_name: str = "sm_90") -> Any:
    """Triton's CompiledKernel of one of the `kernels`."""
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
        bias = forward_pass.bias_by_tma(problem, call)
        boxed: tuple[Tensor, ...] = (q, k, v, out, q if bias is None else bias)
        plan = forward_pass.prepare(problem, call, boxed, (bias is not None,))
        counter = lse.new_empty(1, dtype=torch.int32)
        return _Launch(forward_kernel, boxed, (out, lse, counter, *extras), plan)
    kind = bias_gradient.kind(problem) if problem.bias == "additive" else "none"
    rows = lse.new_empty(3, arguments.scratch_rows(problem))
    accumulated = lse.new_empty(rows.shape[1] * backward_configs.accumulator_columns(problem) // 256, 256)
    each, memory = backward_pass.bias_memory(problem, call, kind)
    dbias = rows if memory is None else memory
    counters = lse.new_empty(rows.shape[1] // 64, dtype=torch.int32)
    launches = {one.name: one for one in backward_configs.launches(problem)}
    errands = [one.errand for one in launches.values()]
    if name == "prologue":
        tensors: tuple[Tensor, ...] = (out, out, lse, lse, rows, accumulated, counters, dbias, rows)
        plan = backward_prologue.prepare(problem, call, (kind, False, "delta" not in errands), tensors)
        return _Launch(backward_prologue.prologue_kernel, (), (*tensors, *extras), plan)
    if name == "epilogue":
        tensors = (accumulated, counters, q, k, v)
        plan = backward_epilogue.prepare(problem, call, tensors)
        return _Launch(backward_epilogue.epilogue_kernel, (), (*tensors, *extras), plan)
    bias, boxes = backward_pass.bias_boxes(problem, call, dbias if kind in ("tile", "summed") else None)
    boxed = (q, k, v, out, rows, accumulated, k, v, q if bias is None else bias, q if boxes is None else boxes)
    table = q if call.lo is None else call.lo.new_empty(call.lo.shape[0], problem.k_len)
    stride_tb = table.stride(0) if problem.table and table.shape[0] > 1 else 0
    variant = ("tile" if each else kind, stride_tb, bias is not None, boxes is not None)
    plan = backward_pass.prepare(problem, call, boxed, (out, q), variant, launches[name])
    tensors = (table, table, dbias, counters, rows, out, out, accumulated, q, rows)
    return _Launch(backward_kernel, boxed, (*tensors, *extras), plan)
