"""Tile sizes: one short table a kernel, first match wins, every row with its reason.

A row serves a family of devices, a size of dtype, head dims up to a limit and calls up to a weight. The families are
"hopper" (compute capability 9 and 10: 227 KB of shared memory, asynchronous tensor cores), "amd" (no compute
capability) and "any" (every device; at most 64 KB, which is what AMD's have). The weight says how many registers the
features of a call take. But for float32 above head dim 64 no row spills on the targets that tests/test_binaries.py
compiles for. Figures are TFLOP/s of one kernel on an H100, causal, from benchmarks/results/h100-tiles.jsonl.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
            raise ValueError(f"tile: got {self.BLOCK_M} x {self.BLOCK_N}, expected at least 16 x 16")

    @property
    def options(self) -> dict[str, int | bool]:
        """Triton's compile options; multiply-adds are fused explicitly, since Triton 3.10 stops doing so by default."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


class Row(NamedTuple):
    """A config for a family, bytes of dtype, head dims up to max_dim and calls up to max_weight."""

    family: str
    itemsize: int
    max_dim: int
    max_weight: int
    config: Config


FORWARD = (
    Row("hopper", 2, 64, 4, Config(64, 64, 4, 3)),  # 428, 128 x 64 with 8 warps 370
    Row("hopper", 2, 128, 0, Config(128, 128, 8, 3)),  # 425, 64 x 64 363, 128 x 64 355; softcap 361
    Row("hopper", 2, 128, 2, Config(128, 64, 8, 3)),  # dropout 280, bias 319; 128 x 128 spills
    Row("hopper", 2, 128, 4, Config(64, 32, 4, 2)),  # the largest without a spill
    Row("hopper", 2, 256, 0, Config(64, 32, 8, 2)),  # 64 x 64 spills with a window
    Row("hopper", 2, 256, 4, Config(32, 32, 4, 2)),
    Row("hopper", 4, 64, 0, Config(128, 64, 8, 3)),
    Row("any", 2, 64, 4, Config(64, 32, 4, 2)),  # "any": the largest that spills neither on sm_80 nor on gfx942
    Row("any", 2, 128, 0, Config(64, 32, 4, 2)),
    Row("any", 2, 128, 4, Config(64, 32, 8, 1)),
    Row("any", 2, 256, 4, Config(32, 32, 4, 1)),
    Row("any", 4, 128, 4, Config(16, 32, 4, 1)),
    Row("any", 4, 256, 4, Config(16, 16, 8, 1)),  # spills: 3xTF32 holds a whole row of 256 twice
)

QUERIES = (
    Row("hopper", 2, 64, 4, Config(64, 64, 4, 3)),  # 540, 128 x 64 with 8 warps 523
    Row("hopper", 2, 128, 2, Config(128, 64, 8, 3)),  # 463, dropout 374; 64 x 64 spills
    Row("hopper", 2, 128, 4, Config(32, 32, 8, 1)),
    Row("hopper", 2, 256, 0, Config(32, 64, 8, 1)),  # 64 rows spill
    Row("hopper", 2, 256, 2, Config(32, 32, 8, 1)),
    Row("hopper", 2, 256, 4, Config(32, 16, 8, 1)),
    Row("hopper", 4, 64, 0, Config(128, 64, 8, 3)),
    Row("any", 2, 64, 4, Config(64, 32, 4, 2)),
    Row("amd", 2, 128, 4, Config(64, 16, 8, 1)),  # spills on sm_80, as 32 x 32 does on gfx942
    Row("any", 2, 128, 4, Config(32, 32, 8, 1)),
    Row("amd", 2, 256, 4, Config(32, 16, 8, 1)),  # spills on sm_80, as 16 x 32 does on gfx942
    Row("any", 2, 256, 4, Config(16, 32, 8, 1)),
    Row("any", 4, 64, 4, Config(32, 16, 4, 1)),
    Row("any", 4, 128, 4, Config(16, 16, 4, 1)),
    Row("any", 4, 256, 4, Config(16, 16, 8, 1)),  # spills, as the forward
)

KEYS = (
    Row("hopper", 2, 64, 0, Config(64, 64, 4, 3)),  # 546, 32 x 64 468
    Row("hopper", 2, 64, 4, Config(32, 64, 4, 3)),  # dropout 278; 64 x 64 gave 300 and spills
    Row("hopper", 2, 128, 1, Config(32, 128, 8, 3)),  # 500, dropout 387; 64 x 128 is faster and spills
    Row("hopper", 2, 128, 2, Config(32, 128, 8, 2)),  # three stages spill with a bias
    Row("hopper", 2, 128, 4, Config(32, 32, 8, 1)),
    Row("hopper", 2, 256, 4, Config(32, 32, 8, 1)),  # 64 keys spill
    Row("hopper", 4, 64, 0, Config(32, 128, 8, 3)),
    Row("any", 2, 64, 4, Config(32, 64, 4, 1)),
    Row("any", 2, 128, 4, Config(16, 64, 8, 1)),
    Row("any", 2, 256, 4, Config(16, 32, 8, 1)),
    Row("any", 4, 64, 4, Config(16, 32, 8, 1)),
    Row("any", 4, 256, 4, Config(16, 16, 8, 1)),  # spills at 256, as the forward
)

BIAS = (
    Row("hopper", 2, 128, 4, Config(64, 64, 8, 2)),  # 52; 128 x 64 gave 70 and spills
    Row("any", 2, 128, 4, Config(64, 32, 4, 1)),
    Row("any", 2, 256, 4, Config(32, 32, 4, 1)),
    Row("any", 4, 256, 4, Config(16, 32, 4, 1)),  # spills above 64, as the forward
)


def forward(problem: Problem) -> Config:
    """Tiles of the forward kernel."""
    return _pick(FORWARD, problem)


def backward_queries(problem: Problem) -> Config:
    """Tiles of the backward's pass over query tiles; BLOCK_M is a multiple of that of `backward_keys`."""
    return _pick(QUERIES, problem)


def backward_keys(problem: Problem) -> Config:
    """Tiles of the backward's pass over key tiles."""
    return _pick(KEYS, problem)


def backward_bias(problem: Problem) -> Config:
    """Tiles of the gradient of a bias that several batches or heads share."""
    return _pick(BIAS, problem)


def _pick(rows: tuple[Row, ...], problem: Problem) -> Config:
    dim = max(problem.qk_dim, problem.v_dim)
    capability = problem.capability
    own = "amd" if capability is None else "hopper" if capability[0] in (9, 10) else "any"
    families = (own, "any")
    needed = (problem.dtype.itemsize, dim, weight(problem))
    for row in rows:
        if row.family in families and _serves(row, *needed):
            return row.config
    raise LookupError(f"no tile sizes for {problem}: the last rows of each table must serve every problem")


def _serves(row: Row, itemsize: int, dim: int, heaviness: int) -> bool:
    return row.itemsize == itemsize and dim <= row.max_dim and heaviness <= row.max_weight


def weight(problem: Problem) -> int:
    """Dropout 1, a bias 2, softcap 1 beside either of them: alone it fits the tiles of a plain call."""
    heavy = (problem.dropout_p > 0) + 2 * (problem.bias is not None)
    return heavy + (heavy > 0 and problem.softcap > 0)
