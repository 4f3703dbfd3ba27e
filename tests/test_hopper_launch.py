"""How a repeated call reaches a Hopper kernel: what is kept, by which key, and the order of the arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.backends.hopper import dialect, launch
from flashtile.gpu import arguments, launcher
from flashtile.problem import Call, Problem

PROBLEM = Problem(1, 64, 64, 2, 2, 64, 64, torch.bfloat16, "cuda", (9, 0))
STREAM, PROGRAMS = 0x5, 7


class Kernel:
    """Stands in for a kernel of one descriptor, one tensor, the extras and one number."""

    arg_names = ("boxed", "tensor", *(f"extra{n}" for n in range(arguments.EXTRAS)), "number")

    def __init__(self) -> None:
        self.first: list[tuple[Any, ...]] = []
        self.again: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*tensors: Any, **numbers: Any) -> Any:
            self.first.append((grid, tensors, numbers))
            return SimpleNamespace(metadata=SimpleNamespace(tensordesc_meta=[{}]))

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(launch, "_kinds", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: STREAM, raising=False)
    monkeypatch.setattr(launcher, "bare_launcher", lambda compiled, programs: lambda *seen: kernel.again.append(seen))
    monkeypatch.setattr(dialect, "encode_descriptor", lambda descriptor, metadata: f"map of {descriptor.base}")
    return kernel


def inputs(offset: int = 0) -> Tensor:
    memory = torch.zeros(64 * 2 * 64 + 64, dtype=torch.bfloat16)
    start = (-memory.data_ptr() % 16) // 2 + offset
    return memory[start : start + 64 * 2 * 64].view(1, 64, 2, 64)


def plan(number: int) -> launch.Plan:
    def describe(boxed: tuple[Tensor, ...]) -> tuple[Any, ...]:
        return (SimpleNamespace(base=boxed[0].data_ptr(), shape=[64], strides=[1]),)

    return launch.Plan(PROGRAMS, {"number": number}, {}, describe)


def run(kernel: Kernel, q: Tensor, problem: Problem = PROBLEM, **extras: Tensor) -> bool:
    """A launch on q; whether all of it was addressable."""
    launches = launch.Launches(problem, Call(q, q, q, **extras), ("forward",), (q,))
    launches.run(kernel, (q,), (q,), partial(plan, 3))
    return launches.fit


def test_a_repeated_call_only_passes_addresses(kernel: Kernel) -> None:
    q, other = inputs(), inputs()
    assert run(kernel, q)
    assert run(kernel, other)
    assert run(kernel, q)
    assert len(kernel.first) == 1
    expected = [
        (STREAM, (f"map of {t.data_ptr()}", 64, 1, *[t.data_ptr()] * (1 + arguments.EXTRAS), 3)) for t in (other, q)
    ]
    assert kernel.again == expected


def test_launches_of_one_kernel_are_told_from_each_other(kernel: Kernel) -> None:
    q = inputs()
    for _ in range(2):
        launches = launch.Launches(PROBLEM, Call(q, q, q), ("backward",), (q,))
        for number, name in enumerate(("backward_keys", "backward_values")):
            launches.run(kernel, (q,), (q,), partial(plan, number), name)
    assert [numbers["number"] for _, _, numbers in kernel.first] == [0, 1]
    assert [passed[-1] for _, passed in kernel.again] == [0, 1]


def test_what_a_binary_depends_on_is_looked_up_anew(kernel: Kernel) -> None:
    q = inputs()
    sinks = replace(PROBLEM, sinks=True)
    run(kernel, q, sinks, sinks=torch.zeros(2))
    run(kernel, q, sinks, sinks=torch.zeros(2, dtype=torch.bfloat16))
    run(kernel, q, sinks, sinks=torch.zeros(4)[::2])
    run(kernel, q.transpose(1, 2).contiguous().transpose(1, 2))
    assert not run(kernel, inputs(offset=1))
    assert len(kernel.first) == 5
    assert not kernel.again


def test_an_extra_is_passed_in_its_place(kernel: Kernel) -> None:
    q, sinks = inputs(), torch.zeros(2)
    for _ in range(2):
        run(kernel, q, replace(PROBLEM, sinks=True), sinks=sinks)
    ((_, passed),) = kernel.again
    assert passed[4:-1].index(sinks.data_ptr()) == 2  # behind bias and slopes
    assert passed[4:-1].count(q.data_ptr()) == arguments.EXTRAS - 1


def test_caches_are_bounded(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_KIND_LIMIT", 2)
    for rows in range(1, 6):
        run(kernel, inputs(), replace(PROBLEM, q_len=rows))
    assert len(launch._kinds) <= 2
