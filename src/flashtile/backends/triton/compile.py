"""Compiles the kernels of a problem for a GPU that need not be there, and reads what the binary needs."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource

from flashtile.backends.triton import bias_gradient, forward_pass, key_pass, launch, query_pass
from flashtile.gpu import arguments, binary
from flashtile.gpu.bias_gradient import allocate
from flashtile.gpu.bias_gradient import kind as kind_of
from flashtile.problem import Problem


def resources(problem: Problem, target_name: str) -> dict[str, binary.Resources]:
    """Compiles every kernel that forward and backward of this problem launch."""
    return {name: binary.read(compiled(name, problem, target_name)) for name in kernels(problem)}


def kernels(problem: Problem) -> list[str]:
    names = ["forward", "queries", "keys"]
    summed = problem.bias == "additive" and kind_of(problem) == "summed"
    return [*names, "bias"] if summed else names


def compiled(name: str, problem: Problem, target_name: str) -> Any:
    """Triton's CompiledKernel of one of `kernels(problem)`."""
    kernel, tensors, plan = _launch(name, problem)
    found = binary.signature(kernel, (), tensors, plan.values, arguments.RUNTIME)
    source = ASTSource(kernel, found.types, found.constants, found.attributes)
    return triton.compile(source, target=binary.target(target_name), options=plan.config.options)


def _launch(name: str, problem: Problem) -> tuple[Any, tuple[Tensor, ...], launch.Plan]:
    """The kernel, stand-ins for its tensors on the meta device, and the plan of its launch."""
    call = binary.meta_call(problem)
    q, k, v = call.q, call.k, call.v
    assert k is not None and v is not None
    out = q.new_empty(problem.out_shape)
    lse = q.new_empty(problem.lse_shape, dtype=torch.float32)
    extras = arguments.extras(call)
    kind = kind_of(problem) if problem.bias == "additive" else "none"
    dbias = allocate(problem, call, kind)
    dbias = q if dbias is None else dbias
    table = q if call.lo is None else call.lo.new_empty(call.lo.shape[0], problem.k_len)
    tensors: tuple[Tensor, ...]
    if name == "forward":
        tensors = (q, k, v, out, lse, *extras)
        return forward_pass.forward_kernel, tensors, forward_pass.prepare(problem, call, tensors, ())
    rows = lse.new_empty(2, arguments.scratch_rows(problem))
    if name == "queries":
        tensors = (q, k, v, out, out, lse, lse, rows, q, dbias, rows, *extras)
        return query_pass.queries_kernel, tensors, query_pass.prepare(problem, call, tensors, (kind, False))
    if name == "keys":
        tensors = (q, k, v, out, rows, k, v, dbias, table, table, *extras)
        return key_pass.keys_kernel, tensors, key_pass.prepare(problem, call, tensors, (kind,))
    tensors = (q, k, v, out, rows, dbias, *extras)
    return bias_gradient.bias_kernel, tensors, bias_gradient.prepare(problem, call, tensors, ())
