"""Compiles the kernels of a problem for a GPU that need not be there, and reads what the binary needs.

`explain` prints it, and tests use it to keep spills out of the shipped configurations.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flashtile.backends.triton import bias_gradient, forward_pass, key_pass, launch, query_pass
from flashtile.gpu import arguments
from flashtile.problem import Call, Problem

_POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


class Resources(NamedTuple):
    """What one kernel takes: registers of a thread, bytes spilled to memory by a thread, bytes of shared memory."""

    registers: int
    spills: int
    shared: int


def target(name: str) -> GPUTarget:
    """The target of a name such as "sm_90" or "gfx942"."""
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 64)


def resources(problem: Problem, target_name: str) -> dict[str, Resources]:
    """Compiles every kernel that forward and backward of this problem launch."""
    return {name: _read(compiled(name, problem, target_name)) for name in kernels(problem)}


def kernels(problem: Problem) -> list[str]:
    names = ["forward", "queries", "keys"]
    summed = problem.bias == "additive" and bias_gradient.kind(problem) == "summed"
    return [*names, "bias"] if summed else names


def compiled(name: str, problem: Problem, target_name: str) -> Any:
    """Triton's CompiledKernel of one of `kernels(problem)`."""
    kernel, tensors, plan = _launch(name, problem)
    names = kernel.arg_names
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    for index, argument in enumerate(names):
        if index < len(tensors):
            signature[argument] = _POINTER[tensors[index].dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
            continue
        value = plan.values[argument]
        if argument in constexprs or (argument not in arguments.RUNTIME and isinstance(value, int) and value == 1):
            signature[argument] = "constexpr"
            constants[(index,)] = value
        elif isinstance(value, float):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i64" if abs(value) >= 2**31 else "i32"
            if argument not in arguments.RUNTIME and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target(target_name), options=plan.config.options)


def _launch(name: str, problem: Problem) -> tuple[Any, tuple[Tensor, ...], launch.Plan]:
    """The kernel, stand-ins for its tensors on the meta device, and the plan of its launch."""
    call = _meta_call(problem)
    q, k, v = call.q, call.k, call.v
    assert k is not None and v is not None
    out = q.new_empty(problem.out_shape)
    lse = q.new_empty(problem.lse_shape, dtype=torch.float32)
    extras = arguments.extras(call)
    kind = bias_gradient.kind(problem) if problem.bias == "additive" else "none"
    dbias = bias_gradient.allocate(problem, call, kind)
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


def _meta_call(problem: Problem) -> Call:
    """A call of this problem without data."""

    def empty(*shape: int, dtype: torch.dtype = problem.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def rows(total: int, length: int) -> tuple[int, ...]:
        return (total,) if problem.varlen else (problem.batch, length)

    bias_dtype = torch.bool if problem.bias == "boolean" else problem.dtype
    cu = empty(problem.batch + 1, dtype=torch.int32) if problem.varlen else None
    table = empty(1, problem.q_len, dtype=torch.int32) if problem.table else None
    return Call(
        empty(*rows(problem.total_q, problem.q_len), problem.q_heads, problem.qk_dim),
        empty(*rows(problem.total_k, problem.k_len), problem.kv_heads, problem.qk_dim),
        empty(*rows(problem.total_k, problem.k_len), problem.kv_heads, problem.v_dim),
        bias=None if problem.bias_shape is None else empty(*problem.bias_shape, dtype=bias_dtype),
        alibi_slopes=empty(problem.q_heads, dtype=torch.float32) if problem.alibi else None,
        sinks=empty(problem.q_heads) if problem.sinks else None,
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        lo=table,
        hi=table,
        rng=empty(2, dtype=torch.int64) if problem.dropout_p > 0 else None,
    )


def _read(kernel: Any) -> Resources:
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]

        def field(name: str) -> int:
            found = re.search(rf"\.{name}:\s+(\d+)", text)
            return int(found.group(1)) if found else 0

        # Scalar registers spill into vector registers; only what is left over goes to memory, the private segment.
        return Resources(field("vgpr_count"), field("private_segment_fixed_size"), kernel.metadata.shared)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [cuobjdump(), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
        numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return Resources(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], kernel.metadata.shared)


def cuobjdump() -> str:
    """NVIDIA's binary inspector, which Triton ships."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
