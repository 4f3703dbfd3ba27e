"""Tile sizes: a short table, first match wins; every row says why."""

from __future__ import annotations

from dataclasses import dataclass

from flashtile.problem import Problem


@dataclass(frozen=True)
class Config:
    """Tile sizes of one kernel: query rows, keys, warps, and stages of the software pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("BLOCK_M", "BLOCK_N", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}: got {value}, expected a power of two")
        if self.BLOCK_M < 16 or self.BLOCK_N < 16:
            raise ValueError(
                f"tile: got {self.BLOCK_M} x {self.BLOCK_N}, expected at least 16 x 16 for the dropout mask"
            )

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's compile options; fused multiply-adds are asked for, since Triton 3.10 no longer makes them by itself."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def forward(problem: Problem) -> Config:
    return Config(64, 64, 4, 2)


def backward_queries(problem: Problem) -> Config:
    return Config(64, 64, 4, 2)


def backward_keys(problem: Problem) -> Config:
    return Config(64, 64, 4, 2)


def backward_bias(problem: Problem) -> Config:
    return Config(64, 64, 4, 2)
