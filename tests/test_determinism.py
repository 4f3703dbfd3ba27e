"""The forward repeats bit by bit, always; the backward does where that is asked for."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from places import PLACES_16_BIT
from torch import Tensor

from flashtile.testing import Case, build, case, evaluate

# Triton's interpreter runs its programs one after another and would repeat anything.
places = pytest.mark.parametrize(
    ("backend", "device"), [place for place in PLACES_16_BIT if place.id != "triton-interpreted"]
)

CHOSEN = ("gqa-causal-odd", "bias-heads", "sinks-window-gqa", "varlen-cross", "dropout-causal-gqa", "everything")


def runs(chosen: Case, backend: str, device: str, grads: bool) -> list[dict[str, Tensor]]:
    inputs = build(chosen, torch.float16, device)
    return [evaluate(chosen, inputs, backend, grads) for _ in range(3)]


def assert_equal_bits(results: list[dict[str, Tensor]]) -> None:
    for other in results[1:]:
        for name, first in results[0].items():
            assert torch.equal(first, other[name]), name


@places
@pytest.mark.parametrize("name", CHOSEN)
def test_forward(backend: str, device: str, name: str) -> None:
    assert_equal_bits(runs(case(name), backend, device, grads=False))


@places
@pytest.mark.parametrize("name", CHOSEN)
def test_backward_on_request(backend: str, device: str, name: str) -> None:
    assert_equal_bits(runs(dataclasses.replace(case(name), deterministic=True), backend, device, grads=True))


@places
@pytest.mark.filterwarnings("ignore:.*CUBLAS_WORKSPACE_CONFIG")
def test_backward_under_pytorchs_own_switch(backend: str, device: str) -> None:
    chosen = dataclasses.replace(case("gqa-causal-odd"), deterministic=None)
    torch.use_deterministic_algorithms(True, warn_only=True)  # cuBLAS warns where its workspace is not set
    assert_equal_bits(runs(chosen, backend, device, grads=True))


def test_the_comparison_rejects_a_different_bit() -> None:
    first = {"dq": torch.zeros(3)}
    with pytest.raises(AssertionError, match="dq"):
        assert_equal_bits([first, {"dq": torch.tensor([0.0, 1e-45, 0.0])}])
