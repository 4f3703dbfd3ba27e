"""Where tests run: each backend on each kind of device that it serves."""

from __future__ import annotations

import pytest
import torch
from interpreter import compute_as_a_gpu_does

GPU = torch.cuda.is_available()

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

every_place = pytest.mark.parametrize(("backend", "device"), PLACES)
