"""Which backend serves a problem: the first of a literal tuple that says it can."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch

from flashtile.problem import Problem

BACKENDS = ("hopper", "triton", "blocked", "reference")

# On a CPU, Triton kernels only run in Triton's interpreter, which is for tests.
CPU_ORDER = ("blocked", "reference", "triton", "hopper")

_requested = threading.local()


def load(name: str) -> ModuleType:
    """The module of a backend: `supports(problem)`, `forward(...)`, `backward(...)`."""
    _check_name(name)
    return _load(name)


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")


@lru_cache
def _load(name: str) -> ModuleType:
    return import_module(f"flashtile.{name}" if name == "reference" else f"flashtile.backends.{name}")


def explain(problem: Problem) -> dict[str, str | None]:
    """For each backend None where it can serve the problem, or the sentence why not."""
    return {name: load(name).supports(problem) for name in BACKENDS}


@lru_cache(maxsize=4096)
def choose(problem: Problem, requested: str | None = None) -> str:
    """The backend for a problem. A requested one is obeyed or refused, never replaced.

    Raises ValueError for an unknown name, NotImplementedError with every backend's reason where none can.
    """
    if requested is not None:
        reason = load(requested).supports(problem)
        if reason is not None:
            raise NotImplementedError(f"backend {requested!r} cannot serve {problem}: {reason}")
        return requested
    for name in CPU_ORDER if problem.device == "cpu" else BACKENDS:
        if load(name).supports(problem) is None:
            return name
    reasons = "; ".join(f"{name}: {reason}" for name, reason in explain(problem).items())
    raise NotImplementedError(f"no backend can serve {problem}: {reasons}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Every call inside uses this backend or raises; the `backend` argument of a call goes before it.

    Raises ValueError for an unknown name. Per thread; contexts nest.
    """
    _check_name(name)
    before = requested_backend()
    _requested.name = name
    try:
        yield
    finally:
        _requested.name = before


def requested_backend() -> str | None:
    """The backend of the innermost `use_backend`, if any."""
    return getattr(_requested, "name", None)


def check_device_errors(device: torch.device | str | int | None = None) -> None:
    """Waits for a device and raises what was wrong with the contents of earlier calls' cu_seqlens or cache tables.

    On a GPU these contents cannot be looked at before a launch without waiting; a call that meets bad ones stays
    within bounds and reports them, and the next call on that device raises. This call asks now.

    Args:
        device: default: every device that packed sequences were computed on.

    Raises:
        ValueError: the report, once; or no such device.
    """
    try:
        device = None if device is None else torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: got {device!r}, expected a device such as 'cuda:0'") from None
    for name in ("flashtile.gpu.mailbox", "flashtile.kvcache.reports"):
        reports = sys.modules.get(name)
        if reports is not None:  # else no call has anything to report
            reports.check(device)
