"""From a problem to launches of Gluon kernels: arguments by name, and caches that make a repeated call cheap.

A kernel's arguments are its descriptors, its other tensors, the call's extras (flashtile.gpu.arguments) and numbers.
All but the addresses is a function of the problem, the strides and the alignment, and worked out once for the whole of
a forward or backward; the tensor maps of the descriptors hold addresses, and are kept for as many addresses as a
training step may meet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from flashtile.backends.hopper import configs, descriptors, dialect
from flashtile.gpu import arguments, launcher
from flashtile.problem import Call, Problem

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

_KIND_LIMIT = 4096
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
    """A kernel that was launched before.

    maps: for each descriptor what it expands to, by the tensor's address; expanded: all of them, by all addresses.
    """

    launch: Callable[[int, tuple[Any, ...]], None]
    boxes: list[dict[str, Any]]
    maps: list[dict[int, tuple[Any, ...]]]
    expanded: dict[tuple[int, ...], tuple[Any, ...]]
    describe: Callable[[tuple[Tensor, ...]], tuple[Any, ...]]
    numbers: tuple[Any, ...]


class _Kind(NamedTuple):
    """What passes share that differ in nothing but addresses."""

    fit: bool
    ready: dict[tuple[int, str], _Ready]


_kinds: dict[tuple[Any, ...], _Kind] = {}


class Launches:
    """The launches of one pass over a call, on the current device and stream.

    fit: whether TMA can address all of `boxed` as they are.
    """

    __slots__ = ("_call", "_extras", "_ready", "_stream", "fit")

    def __init__(
        self,
        problem: Problem,
        call: Call,
        variant: tuple[object, ...],
        boxed: tuple[Tensor, ...],
        pointed: tuple[Tensor, ...] = (),
    ) -> None:
        """variant: names the pass, and whatever else its plans depend on beside the problem and the tensors.

        boxed: the call's own tensors that kernels read and write by TMA; pointed: those that they address otherwise.
        """
        tensors = boxed + pointed
        addresses = [tensor.data_ptr() for tensor in tensors]
        steps = [tensor.stride() for tensor in tensors]
        device = call.q.device.index
        if problem.bare:
            self._extras = [addresses[0]] * arguments.EXTRAS
            others = None
        else:
            self._extras = [tensor.data_ptr() for tensor in arguments.extras(call)]
            addresses += self._extras
            others = (*[None if t is None else (t.dtype, t.shape, t.stride()) for t in call[3:11]],)
        key = (problem, device, variant, _alignment(addresses), others, *steps)
        kind: _Kind | None = _kinds.get(key)
        if kind is None:
            kind = _keep(_kinds, key, _Kind(all(map(descriptors.fits, boxed)), {}), _KIND_LIMIT)
        self.fit, self._ready = kind.fit, kind.ready
        self._call = call
        self._stream = torch._C._cuda_getCurrentRawStream(device)

    def run(
        self,
        kernel: Any,
        boxed: tuple[Tensor, ...],
        tensors: tuple[Tensor, ...],
        prepare: Callable[[], Plan],
        name: str = "",
    ) -> None:
        """Launches `kernel` on descriptors of `boxed`, on `tensors` and on the call's extras.

        prepare: makes the plan for a call of a new kind. name: tells launches of one kernel from each other.
        """
        key = (id(kernel), name)
        ready = self._ready.get(key)
        if ready is None:
            self._ready[key] = _launch_first(kernel, prepare(), boxed, (*tensors, *arguments.extras(self._call)))
            return
        places = (*[tensor.data_ptr() for tensor in boxed],)
        expanded = ready.expanded.get(places)
        if expanded is None:
            expanded = _expand(ready, boxed, places)
        addresses = [tensor.data_ptr() for tensor in tensors]
        ready.launch(self._stream, (*expanded, *addresses, *self._extras, *ready.numbers))


def _alignment(addresses: list[int]) -> int | tuple[bool, ...]:
    """Which addresses are multiples of 16 bytes, 0 where all are: Triton makes another binary for those."""
    combined = 0
    for address in addresses:
        combined |= address
    return combined & 15 and tuple(address & 15 == 0 for address in addresses)


def _keep(cache: dict[_Key, _Value], key: _Key, value: _Value, limit: int = _MAP_LIMIT) -> _Value:
    if len(cache) >= limit:
        cache.clear()
    cache[key] = value
    return value


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs of a kernel run at once, one on each; those of an H100 where there is no device to ask."""
    if device.type != "cuda":
        return configs.MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _expand(ready: _Ready, boxed: tuple[Tensor, ...], places: tuple[int, ...]) -> tuple[Any, ...]:
    """The descriptors as a bare launch takes them, kept for the next call with these addresses."""
    expanded: list[Any] = []
    for index, (maps, place) in enumerate(zip(ready.maps, places, strict=True)):
        expanded += maps.get(place) or _keep(maps, place, _encode(ready, boxed, index))
    return _keep(ready.expanded, places, tuple(expanded))


def _encode(ready: _Ready, boxed: tuple[Tensor, ...], index: int) -> tuple[Any, ...]:
    descriptor = ready.describe(boxed)[index]
    return dialect.encode_descriptor(descriptor, ready.boxes[index]), *descriptor.shape, *descriptor.strides


def _launch_first(kernel: Any, plan: Plan, boxed: tuple[Tensor, ...], tensors: tuple[Tensor, ...]) -> _Ready:
    """Through Triton's own launch, which compiles; then keep what a repeated launch needs."""
    names = kernel.arg_names[len(boxed) + len(tensors) :]
    numbers = tuple(plan.values[name] for name in names)
    compiled = kernel[(plan.programs,)](
        *plan.describe(boxed), *tensors, **dict(zip(names, numbers, strict=True)), **plan.options
    )
    return _Ready(
        launcher.bare_launcher(compiled, plan.programs),
        list(compiled.metadata.tensordesc_meta),
        [{} for _ in boxed],
        {},
        plan.describe,
        numbers,
    )
