"""Clocks: device time of a call, host time of a call, and the memory that a call holds at its peak."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch


class Action(Protocol):
    """What is timed, and the context to enter around it outside of the clock."""

    def context(self) -> AbstractContextManager[None]: ...

    def __call__(self) -> object: ...


class Plain:
    """A function that needs no context."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function

    def context(self) -> AbstractContextManager[None]:
        return nullcontext()

    def __call__(self) -> object:
        return self._function()


FLUSH_BYTES = 512 * 2**20  # ten times an H100's L2 cache; writing it also hides the host's time to launch the next call
WARM_UPS = 3
MOST_REPEATS = 200
TURNS = 5
LEAST_REPEATS = {"cuda": 10, "cpu": 5}
HOST_CALLS = 300
CALLS_IN_QUEUE = 20


def device_times(actions: Sequence[Action], device: str, seconds: float) -> list[list[float]]:
    """Milliseconds of each repeat of each action, after a warm-up, for about `seconds` of work an action.

    On a CUDA device: between two events, the L2 cache overwritten before. Elsewhere: the wall clock around the call.
    The actions take turns, so that a change of the machine's load or of a card's clock meets all of them alike.
    """
    if device == "cuda":
        return _cuda_times(actions, seconds)
    for action in actions:
        with action.context():
            action()
    repeats: list[list[float]] = [[] for _ in actions]
    started = time.perf_counter()
    while len(repeats[0]) < MOST_REPEATS:
        for times, action in zip(repeats, actions, strict=True):
            with action.context():
                before = time.perf_counter()
                action()
                synchronize(device)
                times.append((time.perf_counter() - before) * 1e3)
        long_enough = time.perf_counter() - started > seconds * len(actions)
        if long_enough and len(repeats[0]) >= LEAST_REPEATS["cpu"]:
            break
    return repeats


def _cuda_times(actions: Sequence[Action], seconds: float) -> list[list[float]]:
    flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
    counts = [_repeats_of_a_turn(action, flush, seconds) for action in actions]
    repeats: list[list[float]] = [[] for _ in actions]
    for index in in_turns(len(actions)):
        with actions[index].context():
            repeats[index] += _between_events(actions[index], flush, counts[index])
    return repeats


def _repeats_of_a_turn(action: Action, flush: torch.Tensor, seconds: float) -> int:
    with action.context():
        for _ in range(WARM_UPS):
            action()
        estimate = sum(_between_events(action, flush, 3)) / 3e3
    count = min(MOST_REPEATS, max(LEAST_REPEATS["cuda"], seconds / max(estimate, 1e-6)))
    return max(1, int(count / TURNS))


def in_turns(number: int) -> list[int]:
    """TURNS times 0, 1, ..., number - 1, each time with another one first."""
    return [(first + index) % number for first in range(TURNS) for index in range(number)]


def _between_events(action: Action, flush: torch.Tensor, count: int) -> list[float]:
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        flush.zero_()
        start.record()
        action()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def host_times(actions: Sequence[Action], device: str) -> list[list[float]]:
    """Microseconds that the host spends in each call, by action, in turns: what else the host does differs by the
    second. The device's queue is emptied often, so that it never fills.
    """
    repeats: list[list[float]] = [[] for _ in actions]
    for index in in_turns(len(actions)):
        with actions[index].context():
            repeats[index] += _of_the_host(actions[index], device, HOST_CALLS // TURNS)
    return repeats


def _of_the_host(action: Action, device: str, count: int) -> list[float]:
    for _ in range(WARM_UPS):
        action()
    times = []
    for index in range(count):
        if index % CALLS_IN_QUEUE == 0:
            synchronize(device)
        before = time.perf_counter()
        action()
        times.append((time.perf_counter() - before) * 1e6)
    synchronize(device)
    return times


def peak_bytes(action: Action, device: str) -> int | None:
    """The most bytes of tensors that live at one time during the action, beyond those that lived before it.

    None on devices whose allocations PyTorch does not report.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    return _traced_peak(action) if device == "cpu" else None


def _traced_peak(action: Action) -> int:
    """PyTorch's profiler reports every allocation and release of CPU tensors."""
    with _quiet_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        action()
    changes = [
        (event.start_ns(), event.nbytes()) for event in profile.kineto_results.events() if event.name() == "[memory]"
    ]
    held = most = 0
    for _, change in sorted(changes, key=lambda moment: moment[0]):
        held += change
        most = max(most, held)
    return most


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's library writes lines of its own to the process's stderr, through any progress bar."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def synchronize(device: str) -> None:
    """Waits for all work on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device != "cpu":
        torch.accelerator.synchronize()


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """(median, 20 % quantile, 80 % quantile)."""
    low, middle, high = torch.tensor(times, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return middle.item(), low.item(), high.item()
