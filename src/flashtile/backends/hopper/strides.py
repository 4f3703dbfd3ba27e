"""Strides of the tensors that kernels address by pointers, not by descriptors."""

from __future__ import annotations

from torch import Tensor

from flashtile.gpu import arguments
from flashtile.problem import Problem


def aligned_strides(problem: Problem, tensors: dict[str, Tensor]) -> tuple[dict[str, int], int]:
    """Strides by name (stride_ob and so on) of tensors (batch, rows, heads, dim), and the ALIGN that divides all but
    the innermost, 16 bytes where all strides allow it; packed sequences have no batch stride.

    Multiplied again in the kernel, they tell the compiler that 16-byte loads are right.
    """
    steps = {name: (0, *t.stride()) if problem.varlen else t.stride() for name, t in tensors.items()}
    align = arguments.alignment(problem.dtype, steps.values(), 1)
    values: dict[str, int] = {}
    for name, (b, m, h, d) in steps.items():
        parts = (b // align, m // align, h // align, d)
        values |= {f"stride_{name}{axis}": part for axis, part in zip("bmhd", parts, strict=True)}
    return values, align
