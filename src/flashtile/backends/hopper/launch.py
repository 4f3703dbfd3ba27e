"""From a problem to a launch of a Gluon kernel: arguments by name, and caches that make a repeated call cheap.

A kernel's arguments are its descriptors, its other tensors, the call's extras (flashtile.gpu.arguments) and numbers.
All but the addresses is a function of the problem, the strides and the alignment, and worked out once; the tensor maps
of the descriptors hold addresses, and are kept for as many addresses as a training step may meet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flashtile.backends.hopper import dialect
from flashtile.gpu import arguments
from flashtile.problem import Call, Problem

_READY_LIMIT = 4096
_MAP_LIMIT = 512


class Plan(NamedTuple):
    """How a kernel is launched: a one-dimensional grid, every number by name, and Triton's options.

    describe: makes the descriptors of the tensors that are passed as such.
    """

    programs: int
    values: dict[str, Any]
    options: dict[str, Any]
    describe: Callable[[tuple[Tensor, ...]], tuple[Any, ...]]


class _Ready(NamedTuple):
    run: Callable[..., None]
    function: Any
    metadata: Any
    boxes: list[dict[str, Any]]
    maps: list[dict[int, tuple[Any, ...]]]
    plan: Plan
    tail: tuple[Any, ...]


_ready: dict[tuple[Any, ...], _Ready] = {}


def run(
    kernel: Any,
    problem: Problem,
    call: Call,
    boxed: tuple[Tensor, ...],
    tensors: tuple[Tensor, ...],
    prepare: Callable[[Problem, Call, tuple[Tensor, ...], tuple[object, ...]], Plan],
    variant: tuple[object, ...] = (),
) -> None:
    """Launches `kernel` on descriptors of `boxed`, on `tensors` and on the call's extras.

    prepare: makes the plan for a call of a new kind; variant: what it needs to know beyond the problem, the call
    and the strides of `boxed`.
    """
    address = call.q.data_ptr()
    steps = [tensor.stride() for tensor in boxed]
    addresses = []
    combined = 0
    for tensor in (*tensors, *call[3:11], arguments.mailbox_of(call)):
        if tensor is None:
            addresses.append(address)
        else:
            addresses.append(tensor.data_ptr())
            combined |= addresses[-1]
            steps.append(tensor.stride())
    alignment = combined & 15 and tuple(value & 15 == 0 for value in addresses)
    device = call.q.device.index
    tables = 0 if call.lo is None else call.lo.shape[0]
    key = (id(kernel), problem, variant, device, alignment, tables, *steps)
    ready = _ready.get(key)
    if ready is None:
        _launch_first(kernel, key, prepare(problem, call, boxed, variant), boxed, (*tensors, *arguments.extras(call)))
    elif device == torch.cuda.current_device():
        _launch_again(ready, device, boxed, addresses)
    else:
        with torch.cuda.device(device):
            _launch_again(ready, device, boxed, addresses)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a kernel run at once, one on each; those of an H100 where there is no device to ask."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _launch_again(ready: _Ready, device: int, boxed: tuple[Tensor, ...], addresses: list[int]) -> None:
    expanded: list[Any] = []
    for index, (tensor, maps) in enumerate(zip(boxed, ready.maps, strict=True)):
        descriptor = maps.get(tensor.data_ptr())
        expanded += _encode(ready, boxed, index) if descriptor is None else descriptor
    stream = triton.runtime.driver.active.get_current_stream(device)
    ready.run(
        ready.plan.programs, 1, 1, stream, ready.function, ready.metadata, None, None, None,
        *expanded, *addresses, *ready.tail,
    )  # fmt: skip


def _encode(ready: _Ready, boxed: tuple[Tensor, ...], index: int) -> tuple[Any, ...]:
    """The index-th descriptor as a bare launch takes it, kept for the next call with that address."""
    maps = ready.maps[index]
    if len(maps) >= _MAP_LIMIT:
        maps.clear()
    descriptor = ready.plan.describe(boxed)[index]
    encoded = (
        dialect.encode_descriptor(descriptor, ready.boxes[index]),
        *descriptor.shape,
        *descriptor.strides,
    )
    maps[boxed[index].data_ptr()] = encoded
    return encoded


def _launch_first(
    kernel: Any, key: tuple[Any, ...], plan: Plan, boxed: tuple[Tensor, ...], tensors: tuple[Tensor, ...]
) -> None:
    """Through Triton's own launch, which compiles; then keep what a repeated launch needs."""
    names = kernel.arg_names[len(boxed) + len(tensors) :]
    tail = tuple(plan.values[name] for name in names)
    with torch.cuda.device(tensors[0].device):
        compiled = kernel[(plan.programs,)](
            *plan.describe(boxed), *tensors, **dict(zip(names, tail, strict=True)), **plan.options
        )
    if len(_ready) >= _READY_LIMIT:
        _ready.clear()
    _ready[key] = _Ready(
        dialect.bare_launcher(compiled),
        compiled.function,
        compiled.packed_metadata,
        list(compiled.metadata.tensordesc_meta),
        [{} for _ in boxed],
        plan,
        tail,
    )
