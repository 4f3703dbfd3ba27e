"""Tile sizes, each with the measurement that chose it (docs/kernels/blocked.md has the figures)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashtile.problem import Problem


@dataclass(frozen=True)
class Config:
    """How a problem is cut.

    units: (batch entry, key-value head) pairs of a tile. rows: query rows of each, query heads of a group counted in.
    keys: keys of each. edge: the shorter side of a tile that the mask cuts.
    """

    units: int
    rows: int
    keys: int
    edge: int

    def __post_init__(self) -> None:
        for name in ("units", "rows", "keys", "edge"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")


# First match wins: (the fewest pairs of batch entry and key-value head, config).
FORWARD = (
    (8, Config(units=8, rows=512, keys=512, edge=128)),
    (1, Config(units=2, rows=1024, keys=1024, edge=256)),
)
BACKWARD = (
    (4, Config(units=4, rows=512, keys=1024, edge=256)),
    (1, Config(units=2, rows=1024, keys=1024, edge=512)),
)


def pick_forward(problem: Problem) -> Config:
    return _pick(FORWARD, problem)


def pick_backward(problem: Problem) -> Config:
    return _pick(BACKWARD, problem)


def _pick(table: tuple[tuple[int, Config], ...], problem: Problem) -> Config:
    # Packed sequences are computed one by one.
    pairs = problem.kv_heads * (1 if problem.varlen else problem.batch)
    return next(config for least, config in table if pairs >= least)


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
