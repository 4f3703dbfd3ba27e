"""Tile sizes, each with the measurement that chose it (docs/kernels/blocked.md has the figures)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashtile.problem import Problem


@dataclass(frozen=True)
class Config:
    """How a problem is cut.

    rows: query rows of a tile, query heads of a group counted in. keys: keys of a tile that the mask shows completely.
    edge: the shorter side of a tile that the mask cuts. work: scores of one step over all its (batch, head) pairs.
    """

    rows: int
    keys: int
    edge: int
    work: int

    def __post_init__(self) -> None:
        for name in ("rows", "keys", "edge", "work"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")


FORWARD = Config(rows=256, keys=1024, edge=256, work=2**19)
BACKWARD = Config(rows=1024, keys=512, edge=256, work=2**20)


def pick_forward(problem: Problem) -> Config:
    return FORWARD


def pick_backward(problem: Problem) -> Config:
    return BACKWARD


def working_dtype(problem: Problem) -> torch.dtype:
    """The dtype of the matrix products: float16 is widened, since weights near 2**-14 would lose bits in it."""
    if problem.dtype == torch.bfloat16 and (problem.device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return torch.bfloat16
    return problem.lse_dtype
