"""The forward and backward of a backend made of kernels, imported when they are first asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple


class Passes(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]


@lru_cache
def of(backend: str) -> Passes:
    """Those of a package: late, because they import Triton, and once, for an import statement takes its time too."""
    forward, backward = (import_module(f"{backend}.{name}_pass") for name in ("forward", "backward"))
    return Passes(forward.forward, backward.backward)
