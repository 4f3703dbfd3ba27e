"""Where tests run: each backend on each kind of device that it serves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from interpreter import compute_as_a_gpu_does

GPU = torch.cuda.is_available()
HOPPER = GPU and torch.version.cuda is not None and torch.cuda.get_device_capability() == (9, 0)

on_hopper = pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")

# A process either compiles Triton kernels or interprets them, see conftest.
_interpreted = [] if GPU else [pytest.param("triton", "cpu", id="triton-interpreted")]
if not GPU:
    compute_as_a_gpu_does()

PLACES = (
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("blocked", "cpu", id="blocked"),
    *_interpreted,
    pytest.param("blocked", "cuda", marks=pytest.mark.gpu, id="blocked-gpu"),
    pytest.param("triton", "cuda", marks=pytest.mark.gpu, id="triton-gpu"),
)

# The same and Hopper's, which serves float16 and bfloat16 only.
PLACES_16_BIT = (*PLACES, pytest.param("hopper", "cuda", marks=[pytest.mark.gpu, on_hopper], id="hopper-gpu"))

# What runs on a GPU, for tests that need one.
GPU_BACKENDS = (pytest.param("triton", id="triton"), pytest.param("hopper", marks=on_hopper, id="hopper"))

every_place = pytest.mark.parametrize(("backend", "device"), PLACES)


@contextmanager
def hopper_plans_anew() -> Iterator[None]:
    """The Hopper backend forgets what it knows of calls, before and after: a test has changed what it plans by."""
    from flashtile.backends.hopper import backward_configs, launch

    def forget() -> None:
        launch._kinds.clear()
        backward_configs.launches.cache_clear()

    forget()
    try:
        yield
    finally:
        forget()
