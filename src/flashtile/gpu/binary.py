"""Compiling for a GPU that need not be there: stand-in calls, and what a finished binary needs.

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

from flashtile.problem import Call, Problem

ELEMENT = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
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


def meta_call(problem: Problem) -> Call:
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


def read(kernel: Any) -> Resources:
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


class Signature:
    """Types, constants and attributes of a kernel's arguments, filled one by one in their order."""

    def __init__(self) -> None:
        self.types: dict[str, str] = {}
        self.constants: dict[tuple[int, ...], Any] = {}
        self.attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def add_descriptor(self, name: str, descriptor: Any) -> None:
        """A host-side TensorDescriptor."""
        box = list(descriptor.block_shape)
        self.types[name] = f"tensordesc<{ELEMENT[descriptor.base.dtype]}{box},{descriptor.layout!r}>"

    def add_pointer(self, name: str, tensor: Tensor) -> None:
        self.attributes[(len(self.types),)] = [["tt.divisibility", 16]]
        self.types[name] = "*" + ELEMENT[tensor.dtype]

    def add_number(self, name: str, value: Any, constexpr: bool, specialized: bool) -> None:
        """specialized: Triton makes a 1 a constant and looks whether 16 divides the value."""
        index = (len(self.types),)
        if constexpr or (specialized and isinstance(value, int) and value == 1):
            self.types[name] = "constexpr"
            self.constants[index] = value
        elif isinstance(value, float):
            self.types[name] = "fp32"
        else:
            self.types[name] = "i64" if abs(value) >= 2**31 else "i32"
            if specialized and value % 16 == 0:
                self.attributes[index] = [["tt.divisibility", 16]]


def signature(
    kernel: Any, descriptors: tuple[Any, ...], tensors: tuple[Tensor, ...], values: dict[str, Any], runtime: list[str]
) -> Signature:
    """The signature that a launch with these arguments would have; runtime: names that are not specialized."""
    found = Signature()
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    for name, descriptor in zip(kernel.arg_names, descriptors, strict=False):
        found.add_descriptor(name, descriptor)
    for name, tensor in zip(kernel.arg_names[len(descriptors) :], tensors, strict=False):
        found.add_pointer(name, tensor)
    for name in kernel.arg_names[len(descriptors) + len(tensors) :]:
        found.add_number(name, values[name], name in constexprs, name not in runtime)
    return found


def cuobjdump() -> str:
    """NVIDIA's binary inspector, which Triton ships."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
