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


# Scratch memory is a few times units * rows * keys scores, whatever the lengths. Milliseconds: B1 H8 N4096 D64 on
# two cores with AVX-512 BF16, forward full and causal, backward full and causal; docs/kernels/blocked.md says more.

# bfloat16: 76, 55, 173, 118. With 8 x 512 x 512: 76, 55, 180, 120; with 2 x 1024 x 1024: 78, 60, 176, 125.
MANY_HEADS = Config(units=4, rows=512, keys=1024, edge=256)

# bfloat16, one head alone: 9.6 forward; with 512 x 1024: 10.8, with 512 x 512: 13.3.
FEW_HEADS = Config(units=2, rows=1024, keys=1024, edge=256)

# float32: 211, 124, 524, 300. With 8 x 512 x 512: 228, 129, 570, 314; with 4 x 512 x 1024, backward: 597, 329.
WIDE = Config(units=2, rows=512, keys=512, edge=256)


def pick_forward(problem: Problem) -> Config:
    return _pick(problem)


def pick_backward(problem: Problem) -> Config:
    return _pick(problem)


def _pick(problem: Problem) -> Config:
    """Forward and backward want the same tiles, as measured so far."""
    if working_dtype(problem) != torch.bfloat16:
        return WIDE
    # Packed sequences are computed one by one.
    pairs = problem.kv_heads * (1 if problem.varlen else problem.batch)
    return MANY_HEADS if pairs >= MANY_HEADS.units else FEW_HEADS


# Below this head dim a product costs less than rounding its operands and widening its result.
_LEAST_NARROW_DIM = 16

# Below this many scores products cost nothing either way, and scores of a few rows rounded to bfloat16 may all be less
# lucky than plain PyTorch's: only many average out.
_LEAST_NARROW_SCORES = 2**17


def working_dtype(problem: Problem) -> torch.dtype:
    """The dtype of the matrix products: that of the results, or bfloat16 where the device is fast in it.

    float16 is widened: few CPUs multiply it faster than float32, and weights below 2**-14 would lose digits in it.
    """
    fast = problem.device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    many = problem.batch * problem.q_heads * problem.q_len * problem.k_len >= _LEAST_NARROW_SCORES
    if problem.dtype == torch.bfloat16 and fast and many and problem.qk_dim >= _LEAST_NARROW_DIM:
        return torch.bfloat16
    return problem.lse_dtype
