"""Triton kernels for every GPU that Triton knows; on a CPU they run in Triton's interpreter, for tests.

Triton is imported by the first forward or backward, not by importing this package.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from flashtile.gpu import arguments, mailbox, passes
from flashtile.problem import Call, Problem

__all__ = ["backward", "forward", "supports"]


def supports(problem: Problem) -> str | None:
    """None where the kernels serve this problem, or the sentence why not."""
    if problem.dtype == torch.float64:
        return "float64 has no tensor-core product in Triton; float16, bfloat16 and float32 are served"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if problem.device == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1":
            return None
        return "the tensors are on the CPU; Triton runs there only in its interpreter (TRITON_INTERPRET=1), for tests"
    if problem.device not in ("cuda", "xpu"):
        return f"Triton has no {problem.device} devices"
    if problem.capability is not None and problem.capability < (7, 5):
        return f"Triton needs compute capability 7.5 or newer, this device has {'.'.join(map(str, problem.capability))}"
    return None


def forward(problem: Problem, call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse); see docs/design.md, the backend contract.

    Raises ValueError where an earlier call's kernel on this device met bad cu_seqlens contents.
    """
    mailbox.raise_if_set(call.q.device.index)
    return passes.of(__name__).forward(problem, arguments.in_order(call), out)


def backward(
    problem: Problem,
    call: Call,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    bias_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes grads = (dq, dk, dv) and returns (dbias, dsinks); see docs/design.md, the backend contract."""
    run = passes.of(__name__).backward
    return run(problem, arguments.in_order(call), out, lse, dout, dlse, grads, bias_grad)
