"""Tile sizes, each with the measurement that chose it (docs/kernels/blocked.md has the figures)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashtile.problem import Problem


@dataclass(frozen=True)
class Config:
    """How a problem is cut.

    rows: query rows of a tile, query heads of a group counted in. keys: keys of a tile. edge: the shorter side of a
    tile that the mask cuts.
    """

    rows: int
    keys: int
    edge: int

    def __post_init__(self) -> None:
        for name in ("rows", "keys", "edge"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")


FORWARD = Config(rows=1024, keys=1024, edge=512)
BACKWARD = Config(rows=1024, keys=1024, edge=512)


def pick_forward(problem: Problem) -> Config:
    return FORWARD


def pick_backward(problem: Problem) -> Config:
    return BACKWARD


# Below this head dim a product costs less than rounding its operands and widening its result.
_LEAST_NARROW_DIM = 16


def working_dtype(problem: Problem) -> torch.dtype:
    """The dtype of the matrix products: that of the results, or bfloat16 where the device is fast in it.

    float16 is widened: few CPUs multiply it faster than float32, and weights below 2**-14 would lose digits in it.
    """
    fast = problem.device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if problem.dtype == torch.bfloat16 and fast and problem.qk_dim >= _LEAST_NARROW_DIM:
        return torch.bfloat16
    return problem.lse_dtype
