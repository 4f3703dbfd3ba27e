"""From a problem to a launch: arguments by name, and a cache that makes a repeated call cost little host time.

Triton's own launch inspects every argument on every call. Here everything but the addresses is a function of the
problem, the strides and the alignment, so it is worked out once and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flashtile.backends.triton.configs import Config
from flashtile.gpu import arguments, launcher
from flashtile.problem import MAX_HEAD_DIM, Call, Problem


class Plan(NamedTuple):
    """How a kernel is launched: a one-dimensional grid, every argument that is not a pointer, and its tile sizes."""

    programs: int
    values: dict[str, Any]
    config: Config


class _Ready(NamedTuple):
    """A kernel that was launched before: how to find the device's stream, to start it there, and its numbers."""

    stream_of: Callable[[int], int]
    start: Callable[[int, tuple[Any, ...]], None]
    numbers: tuple[Any, ...]


_ready: dict[tuple[Any, ...], _Ready] = {}
_READY_LIMIT = 4096


def run(
    kernel: Any,
    problem: Problem,
    call: Call,
    tensors: tuple[Tensor, ...],
    prepare: Callable[[Problem, Call, tuple[Tensor, ...], tuple[object, ...]], Plan],
    variant: tuple[object, ...] = (),
) -> None:
    """Launches `kernel` on `tensors` and the call's `extras`; `prepare` makes the rest for a call of a new kind.

    variant: what `prepare` needs to know beyond the problem and the tensors' strides.
    """
    addresses = [tensor.data_ptr() for tensor in tensors]
    combined = 0
    for value in addresses:
        combined |= value
    steps: list[Any] = [tensor.stride() for tensor in tensors]
    if problem.bare:
        addresses += [addresses[0]] * arguments.EXTRAS
    else:
        for extra in (*call[3:11], arguments.mailbox_of(call)):
            if extra is None:
                addresses.append(addresses[0])
            else:
                addresses.append(extra.data_ptr())
                combined |= addresses[-1]
                steps += (extra.stride(), extra.dtype)
    alignment = combined & 15 and tuple(value & 15 == 0 for value in addresses)
    device = tensors[0].device.index
    precision = float32_precision(problem) if problem.dtype == torch.float32 else None
    # A table for all batch entries has the strides of a table for each of them.
    tables = 0 if call.lo is None else call.lo.shape[0]
    key = (id(kernel), problem, variant, device, alignment, precision, tables, *steps)
    ready = _ready.get(key)
    if ready is None:
        _launch_first(kernel, key, prepare(problem, call, tensors, variant), (*tensors, *arguments.extras(call)))
    elif device == torch.cuda.current_device():
        _launch_again(ready, device, addresses)
    else:
        with torch.cuda.device(device):
            _launch_again(ready, device, addresses)


def _launch_again(ready: _Ready, device: int, addresses: list[int]) -> None:
    ready.start(ready.stream_of(device), (*addresses, *ready.numbers))


def _launch_first(kernel: Any, key: tuple[Any, ...], plan: Plan, tensors: tuple[Tensor, ...]) -> None:
    """Through Triton's own launch, which compiles; then keep what a repeated launch needs."""
    names = kernel.arg_names[len(tensors) :]
    numbers = tuple(plan.values[name] for name in names)
    with torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else nullcontext():
        compiled = kernel[(plan.programs,)](*tensors, **dict(zip(names, numbers, strict=True)), **plan.config.options)
    if not tensors[0].is_cuda:  # the interpreter compiles nothing
        return
    if len(_ready) >= _READY_LIMIT:
        _ready.clear()
    stream_of = triton.runtime.driver.active.get_current_stream
    _ready[key] = _Ready(stream_of, launcher.bare_launcher(compiled, plan.programs), numbers)


def strides(problem: Problem, call: Call, dense: dict[str, Tensor], biases: dict[str, Tensor | None]) -> dict[str, Any]:
    """Every stride of a kernel's tensors by its name, stride_qb and so on, with what is known of them.

    dense: tensors (batch, rows, heads, dim) by the letter that names their strides; packed sequences have no batch
    stride. biases: like bias, (batch, heads, q_len, k_len), 0 where broadcast.

    ALIGN and BIAS_ALIGN are the number of elements in 16 bytes where all strides but the innermost are multiples of it;
    they are passed divided by it and multiplied again in the kernel, which tells the compiler that 16-byte loads are
    right whatever the head dim. BLOCK_D and BLOCK_DV are the head dims as powers of two.
    """
    steps = {name: (0, *t.stride()) if problem.varlen else t.stride() for name, t in dense.items()}
    align = arguments.alignment(problem.dtype, steps.values(), 1)
    values: dict[str, Any] = {}
    for name, (b, m, h, d) in steps.items():
        axes = ("b", "n" if name == "x" and "w" in steps else _ROWS[name], "h", "d")
        parts = (b // align, m // align, h // align, d)
        values |= {f"stride_{name}{axis}": part for axis, part in zip(axes, parts, strict=True)}
    bias_values, bias_steps = arguments.bias_strides(problem, {"b": call.bias, **biases})
    values |= bias_values
    within_tile = [abs(s[axis]) for s in steps.values() for axis in (1, 3)]
    within_tile += [abs(step) for s in bias_steps for step in s[2:]]
    values["WIDE"] = max(within_tile) * MAX_HEAD_DIM >= 2**31
    values["ALIGN"] = align
    values["BLOCK_D"], values["BLOCK_DV"] = _blocks(problem, align)
    return values


_ROWS = {"q": "m", "k": "n", "v": "n", "o": "m", "y": "m", "x": "m", "w": "n"}


def _blocks(problem: Problem, align: int) -> tuple[int, int]:
    """qk_dim and v_dim as powers of two, the rest of which is masked."""
    block_d, block_dv = (max(16, triton.next_power_of_2(dim)) for dim in (problem.qk_dim, problem.v_dim))
    if problem.dtype.itemsize < 4 and (align == 1 or problem.qk_dim % 2 or problem.v_dim % 2):
        # Two bytes at a time is too little for an asynchronous copy. K and V then take turns in one buffer, and
        # ptxas 12.8 computes the second descriptor from an unset register where the two have different shapes.
        return max(block_d, block_dv), max(block_d, block_dv)
    return block_d, block_dv


def constants(problem: Problem, config: Config) -> dict[str, Any]:
    """The compile-time arguments that every kernel takes."""
    return {
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
        "STAGES": config.num_stages,
        "D": problem.qk_dim,
        "DV": problem.v_dim,
        **arguments.features(problem),
        "PRECISION": float32_precision(problem),
        "WIDEN": problem.device == "cpu",
    }


def float32_precision(problem: Problem) -> str:
    """How float32 products are made: exactly to float32, or in TF32 where PyTorch's own switch allows it."""
    if problem.dtype != torch.float32 or problem.capability is None:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if problem.capability >= (8, 0) else "ieee"
