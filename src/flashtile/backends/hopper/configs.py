"""Tile sizes and warp roles of the Hopper kernels: one short table, first match wins, every row with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from flashtile.problem import Problem


@dataclass(frozen=True)
class Config:
    """Tile sizes and roles of the forward kernel.

    groups: consumer warp groups of 64 query rows. block_n: keys of a tile. stages: slots of the K and V rings.
    registers: of a consumer's and of a producer's thread.
    shared: O leaves through Q's shared memory. query_stages: slots of the ring of query tiles. pieces: a tile is
    weighed in so many, to save registers, and its scores are kept; 0: at once and in their place. strips: each consumer
    skips the key tiles that only others see.
    panels: queries and keys lie in panels of 64 columns, as many as the head dim needs, not in a power of two; O, which
    has 128, leaves through two of the queries'.
    """

    groups: int
    block_n: int
    stages: int
    registers: tuple[int, int]
    shared: bool = False
    query_stages: int = 1
    pieces: int = 1
    strips: bool = False
    panels: bool = False

    def __post_init__(self) -> None:
        if self.panels and not self.shared:
            raise ValueError("panels: got True without shared, but O leaves through them")


class Row(NamedTuple):
    """A config for padded head dims up to max_dim, calls up to a weight, and problems that `only` holds of.

    bias_tiles: only where a bias comes by TMA, whose tiles take registers for a moment, but shared memory.
    """

    max_dim: int
    max_weight: int
    config: Config
    only: Callable[[Problem], bool] = lambda problem: True
    bias_tiles: bool = False


def unmasked(problem: Problem) -> bool:
    """True where every row sees all keys."""
    return problem.window_left is None and problem.window_right is None and not problem.table


def _rounds(problem: Problem, groups: int) -> int:
    """How many items an SM of an H100 gets."""
    return -(-problem.batch * problem.q_heads * -(-problem.q_len // (64 * groups)) // MULTIPROCESSORS)


def _few_rounds(problem: Problem) -> bool:
    """Where an SM gets few items of 256 rows, and few SMs get the last one; a round of 128 takes 0.57 as long."""
    four = _rounds(problem, 4)
    return unmasked(problem) and not problem.varlen and four <= 4 and 0.57 * _rounds(problem, 2) < 0.97 * four


def _narrow_values(problem: Problem) -> bool:
    return 128 < problem.qk_dim <= 192 and 64 < problem.v_dim <= 128 and _dense_without_left(problem)


def _softcap_alone(problem: Problem) -> bool:
    return problem.softcap > 0 and not problem.varlen and not _left(problem)


def _left(problem: Problem) -> bool:
    return problem.table or problem.window_left is not None


def _without_left(problem: Problem) -> bool:
    return not _left(problem)


def _dense_without_left(problem: Problem) -> bool:
    return not _left(problem) and not problem.varlen


def _many_keys(problem: Problem) -> bool:
    """Where rows see many keys: few are better shared by three groups of rows than by four."""
    if problem.table or (problem.window_left is not None and min(problem.window_left, problem.k_len) < 512):
        return False
    return unmasked(problem) or not problem.varlen or problem.k_len >= 2048


def _light(problem: Problem) -> bool:
    return problem.dropout_p == 0 and not (problem.varlen and _left(problem))


def _light_without_left(problem: Problem) -> bool:
    return _light(problem) and not _left(problem)


def _light_dense_without_left(problem: Problem) -> bool:
    return _light(problem) and _dense_without_left(problem)


def _no_packed_table(problem: Problem) -> bool:
    return not (problem.varlen and problem.table)


MULTIPROCESSORS = 132  # of an H100 and an H200

MOST_WITH_BIAS_TILES = 4  # the weight of calls whose bias comes by TMA; with more, tiles of it spill

_TWO = (240, 24)
_THREE = (160, 32)
_FOUR = (112, 24)

# Figures: TFLOP/s on an H100, bf16, causal and 8192 long unless said otherwise; docs/kernels/hopper_forward.md.
FORWARD = (
    # 2 x 10 heads of 4096, full: 463, four groups 442
    Row(64, 0, Config(2, 128, 3, _TWO, query_stages=2, pieces=0), _few_rounds),
    # packed 1738 us, with scores kept by three groups 2062; causal, up to 4096, 2048 and 1024 1020, 734 and 591, kept
    # 1123, 750 and 578; windows of 1024, 512 and 256 285, 200 and 155, kept 311, 207 and 153
    Row(64, 0, Config(4, 64, 4, _FOUR, query_stages=2, strips=True, pieces=0), _many_keys),
    # window of 128 124 us, in place 130; dropout 302, four groups 243; softcap 369 and 374, which spills
    Row(64, 1, Config(3, 64, 4, _THREE, query_stages=2, strips=True)),
    Row(64, 9, Config(3, 64, 3, _THREE, query_stages=2, strips=True)),  # tiles of a bias need room
    Row(128, 0, Config(2, 128, 2, _TWO, query_stages=2), _without_left),  # full 709 at 16384, two pieces 696
    Row(128, 0, Config(2, 128, 2, _TWO, query_stages=2, pieces=2)),  # one piece spills
    # softcap in one piece 577, two groups of 128 keys 539
    Row(128, 1, Config(3, 64, 4, _THREE, shared=True, strips=True, pieces=2), _softcap_alone),
    Row(128, 1, Config(2, 128, 2, _TWO, query_stages=2, pieces=2)),  # dropout 427, 64 keys 393; ALiBi 584
    Row(128, 2, Config(2, 128, 2, _TWO, shared=True, pieces=2), bias_tiles=True),  # bias 468, 64 keys 367
    Row(128, 3, Config(2, 64, 3, _TWO, shared=True, query_stages=2), _without_left, bias_tiles=True),  # more spill
    Row(128, 2, Config(2, 64, 3, _TWO, query_stages=2)),  # 128 keys spill
    Row(128, 9, Config(2, 32, 4, _TWO, query_stages=2)),  # 64 keys spill
    # 192 with values of 128, causal, 4096: 695, 584 with 64 keys in one tile of 256 columns
    Row(192, 0, Config(2, 128, 2, _TWO, shared=True, pieces=2, panels=True), _narrow_values),
    # full 768, two pieces 753
    Row(256, 1, Config(2, 64, 2, _TWO, shared=True, strips=True), _light_dense_without_left),
    Row(256, 1, Config(2, 64, 2, _TWO, shared=True, strips=True, pieces=2), _light_without_left),  # one piece spills
    Row(256, 1, Config(2, 64, 2, _TWO, shared=True, pieces=2), _light),  # strips spill
    Row(256, 2, Config(2, 32, 3, _TWO, shared=True), _no_packed_table),  # 64 keys spill; heavier calls spill with 32
)


def forward(problem: Problem, bias_tiles: bool = False) -> Config | None:
    """Tiles and roles of the forward kernel; None where no row serves the problem. bias_tiles: a bias comes by TMA."""
    dim = max(problem.qk_dim, problem.v_dim)
    heaviness = weight(problem)
    for row in FORWARD:
        if dim <= row.max_dim and heaviness <= row.max_weight and row.bias_tiles <= bias_tiles and row.only(problem):
            return row.config
    return None


def addressable_bias(problem: Problem) -> bool:
    """True where TMA can load a bias of the call's own dtype, contiguous: a value for each row and key."""
    if problem.bias != "additive" or problem.bias_shape is None:
        return False
    return problem.bias_shape[2:] == (problem.q_len, problem.k_len) and problem.k_len % 8 == 0


def room_for_bias(problem: Problem) -> bool:
    """True where registers are left for tiles of a bias."""
    return weight(problem) <= MOST_WITH_BIAS_TILES


def width(dim: int) -> int:
    """Columns of a tile for a head dim: a power of two, of which TMA fills what is beyond the head dim with 0."""
    return max(32, 1 << (dim - 1).bit_length())


def columns(dim: int) -> int:
    """Columns of a tile that products read: the head dim as a multiple of 16, the depth of one wgmma."""
    return -(-dim // 16) * 16


def weight(problem: Problem) -> int:
    """How many registers the features of a call take."""
    changes = (problem.dropout_p > 0) + (problem.softcap > 0) + problem.alibi + 2 * (problem.bias is not None)
    if changes == 0:
        return 0
    return changes + problem.varlen + _left(problem)
