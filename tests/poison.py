"""Memory that nobody has written yet holds NaN in tests, so that a result which was never computed cannot pass by luck.

Fresh memory is often zero, and zero is often the right answer; NaN never is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
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


def install() -> None:
    """Replaces PyTorch's allocators of uninitialised memory for the rest of the process; a second call does nothing."""
    for owner, name in _ALLOCATORS:
        allocator = getattr(owner, name)
        if not hasattr(allocator, "allocates_poison"):
            setattr(owner, name, _poisoned(allocator))


def _poisoned(allocator: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(allocator)
    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocator(*args, **kwargs)
        with torch.no_grad():
            return tensor.fill_(_poison(tensor.dtype))

    allocate.allocates_poison = True  # type: ignore[attr-defined]
    return allocate


def _poison(dtype: torch.dtype) -> float | int | bool:
    """NaN, or for integers the most negative value: an index made of it is far out of range."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).min + 1
