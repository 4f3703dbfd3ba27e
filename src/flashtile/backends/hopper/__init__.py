"""Gluon kernels for Hopper (compute capability 9.0): TMA, wgmma and warp roles.

Triton is imported by the first forward or backward, not by importing this package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashtile.backends.hopper import configs
from flashtile.gpu import arguments, mailbox, passes
from flashtile.problem import Call, Problem

__all__ = ["backward", "forward", "supports"]


def supports(problem: Problem) -> str | None:
    """None where the kernels serve this problem, or the sentence why not."""
    if problem.device != "cuda" or problem.capability != (9, 0):
        return "its instructions exist on NVIDIA devices of compute capability 9.0 only"
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return "its products are 16-bit; float16 and bfloat16 are served"
    if configs.forward(problem) is None:
        return "registers do not hold head dims above 128 with that many features of the scores at once"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return None


def forward(problem: Problem, call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse); see docs/design.md, the backend contract.

    Raises ValueError where an earlier call's kernel on this device met bad cu_seqlens contents.
    """
    mailbox.raise_if_set(call.q.device.index)
    return _on_its_device(passes.of(__name__).forward, problem, arguments.in_order(call), out)


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
    return _on_its_device(run, problem, arguments.in_order(call), out, lse, dout, dlse, grads, bias_grad)


def _on_its_device(run: Callable[..., Any], problem: Problem, call: Call, *rest: Any) -> Any:
    """run(problem, call, ...) while the call's device is the current one, on which kernels are launched."""
    device = call.q.device
    if device.index == torch._C._cuda_getDevice():
        return run(problem, call, *rest)
    with torch.cuda.device(device):
        return run(problem, call, *rest)
