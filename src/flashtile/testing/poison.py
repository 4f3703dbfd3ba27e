"""Uninitialised memory made visible: inside `poisoned()` it holds NaN, so that a value never written shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
)


@contextmanager
def poisoned() -> Iterator[None]:
    """PyTorch's five allocators of uninitialised memory fill what they return: NaN, or the largest integer.

    Not for several threads at once: it replaces the functions for a while.
    """
    originals = [(owner, name, getattr(owner, name)) for owner, name in _ALLOCATORS]
    for owner, name, original in originals:
        setattr(owner, name, _filling(original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _filling(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_and_fill(*args: Any, **keywords: Any) -> Tensor:
        tensor = allocate(*args, **keywords)
        with torch.no_grad():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(torch.iinfo(tensor.dtype).max)
        return tensor

    return allocate_and_fill
