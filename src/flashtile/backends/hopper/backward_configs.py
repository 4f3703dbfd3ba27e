"""Tile sizes and warp roles of the backward on Hopper: one short table, first match wins, every row with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from flashtile.backends.hopper import configs
from flashtile.problem import Problem


@dataclass(frozen=True)
class Config:
    """Tile sizes and roles of the backward kernel.

    block_m: query rows of a step. groups: consumer warp groups of 64 keys; with one group of keys, two consumers share
    them, one for each gradient (backward_wide.py). stages: slots of the ring of query and dO
    tiles. slots: of the shared memory through which dQ leaves. registers: of a thread of a consumer, of the warp group
    that makes dQ, or runs errands where dV has a launch of its own, and of the warps that load and notify; warp groups
    of four warps share 512, those two count as one. With three groups that make both gradients none is left: the one
    that makes dQ loads, too. rotates: keys and values come in turns
    through three tiles of one width, so that the next item's keys come while this one's are in use. panels: keys and
    queries lie in three panels of 64 columns, and dV has a launch of its own (backward_split.py).
    """

    block_m: int
    groups: int
    stages: int
    slots: int
    registers: tuple[int, int, int]
    rotates: bool = False
    panels: bool = False

    def __post_init__(self) -> None:
        if self.groups not in (1, 2, 3):
            raise ValueError(f"groups: got {self.groups}, expected 1, 2 or 3")
        if self.block_m not in (64, 128):
            raise ValueError(f"block_m: got {self.block_m}, expected 64 or 128")
        consume, reduce, load = self.registers
        if max(2, self.groups) * consume + reduce + load > 512:
            raise ValueError(f"registers: got {self.registers} with {self.groups} groups, expected at most 512 in all")

    @property
    def block_n(self) -> int:
        """Keys of a program."""
        return 64 * self.groups


class Row(NamedTuple):
    """A config for padded head dims up to max_dim. bias_tiles: it leaves shared memory to tiles of a bias.

    Rows of one head dim share block_m: what lies between the kernels is ordered by it.
    """

    max_dim: int
    config: Config
    bias_tiles: bool = False


# TFLOP/s of the whole backward on an H100, bf16, 4096 rows, full / causal.
BACKWARD = (
    Row(64, Config(64, 3, 4, 2, (144, 80, 0))),  # 511 / 434; two consumers and steps of 128 rows 483 / 407
    Row(64, Config(64, 2, 4, 2, (208, 72, 24)), bias_tiles=True),  # causal, 8192: 415; a third consumer lacks registers
    # causal 560, 543 with the next row; full 583 and 589, 16384 617 and 630
    Row(128, Config(64, 2, 2, 2, (208, 72, 24), rotates=True)),
    Row(128, Config(64, 2, 3, 2, (208, 72, 24))),
    Row(128, Config(64, 2, 2, 2, (208, 72, 24)), bias_tiles=True),  # causal, 8192: 553; a third stage does not fit
    # 192 with values of 128, 128 heads: causal 4409 us, the next row 5200; without a mask 7758 and 9568
    Row(192, Config(64, 2, 2, 2, (208, 72, 24), panels=True)),
    Row(256, Config(64, 1, 2, 2, (208, 72, 24))),  # 422 / 380; dQ through one slot 401 / 368
)

# dV of what has panels. Full 7758 us, with two consumers 7952; causal 4409 and 4422. Errands need registers,
# which their consumers have: 4570 us where errands spill theirs, else 4170.
VALUES = Config(64, 3, 2, 2, (144, 56, 24), panels=True)
VALUES_AND_ERRANDS = Config(64, 3, 2, 2, (136, 80, 24), panels=True)


_LONG_WALK = 2048  # rows
_LONGEST_TOGETHER = 4096
_ERRAND_WALK = 1024
# Beside so many the end of a second launch, at which some programs have nothing to do, counts little. Not measured.
_ITEMS_OF_TWO = 8 * configs.MULTIPROCESSORS


def widths(problem: Problem) -> tuple[int, int]:
    """Columns of the tiles of q and k, and of v: where one of them is above 128, both gradients come in halves."""
    dim, v_dim = configs.width(problem.qk_dim), configs.width(problem.v_dim)
    least = 128 if max(dim, v_dim) > 128 else 0
    return max(dim, least), max(v_dim, least)


def mirrors(problem: Problem) -> bool:
    """True where every other section of heads goes through its rows and tiles from the other end.

    Tiles that write in order start with the shortest walk, so that the longest, of a whole group of heads, would come
    last of all. From the other end they start with the longest. Causal, 8192, 3376 us and 2465, without an order 2293.
    """
    whole = problem.bias is None and not problem.varlen and problem.k_len % 128 == 0
    grouped = problem.group > 1 and not relays(problem)
    return problem.deterministic and grouped and _triangular(problem) and whole


def relays(problem: Problem) -> bool:
    """True where each query head of a group comes to the tiles of keys in a round of its own (backward_relay.py).

    Causal, head dim 256, groups of 4, deterministic: 1024 967 us and 820, 8192 4933 and 3674; groups of 2, 2048, 1096
    and 1198. In any order: groups of 4, 2048 1077 and 1104, 4096 1953 and 1815; of 8, 2048 1867 and 1100. At head dim
    128: groups of 8, 512 804 and 1037, 1024 1185 and 1111, 4096 3166 and 2559, with no more tiles than programs 619 and
    630; of 6, 4096 2151 and 2157. At 64: of 8, 4096 1637 and 1882.
    """
    dim = max(problem.qk_dim, problem.v_dim)
    large = problem.group >= 8
    if dim > 128:
        pays = large or problem.deterministic or problem.k_len > _LONG_WALK
    else:
        tiles = problem.batch * problem.kv_heads * -(-problem.k_len // 128)
        pays = dim > 64 and large and problem.k_len >= 1024 and tiles > configs.MULTIPROCESSORS
    return _triangular(problem) and problem.group > 2 and pays


def alone(problem: Problem, tiles: int) -> int:
    """Of the tiles of a head's keys, so many first ones have rounds. The last ones, whose walks are short, are gone
    through with all heads of a group at once: together they take no longer than the longest, and no sums wait.

    Causal, head dim 256, groups of 4: deterministic 1024 828 us with rounds everywhere and 820, 4096 2080 and 2022, but
    8192 3660 and 3980; in any order 4096 1834 and 1815, 8192 3315 and 3283.
    """
    return tiles if problem.deterministic and problem.k_len > _LONGEST_TOGETHER else tiles - tiles // problem.group


def _triangular(problem: Problem) -> bool:
    """True where the walks of a head are each a little longer than the one after."""
    return problem.window_right is not None and problem.window_left is None and not problem.table


def relay_columns(problem: Problem) -> int:
    """Columns of what waits in memory between two rounds: dK and dV, dK alone where dV has a launch of its own."""
    return accumulator_columns(problem) + (0 if pick(problem).panels else widths(problem)[1])


class Launch(NamedTuple):
    """One launch of the main kernel.

    makes: dK and dQ of "keys", dV of "values", or "both". errand: what it makes besides (backward_errands.py), "delta"
    for the next launch, "dq" from the accumulator of the one before, or "none". first_head, heads: the key-value heads,
    of all batches, whose gradients it makes.
    """

    name: str
    makes: str
    errand: str
    first_head: int
    heads: int


@lru_cache(maxsize=4096)  # asked on every call
def launches(problem: Problem, dlse: bool = False) -> tuple[Launch, ...]:
    """The launches of the main kernel, in their order. dlse: there is a gradient of lse, and delta depends on it.

    Long ones for dV come in two parts, so that both have errands for the one between them.
    """
    heads = problem.batch * problem.kv_heads
    if not _narrow_values(problem):
        return (Launch("backward", "both", "none", 0, heads),)
    # Of float16 calls the prologue makes delta, for it measures dO.
    free = problem.dtype == torch.bfloat16 and not dlse and _has_time(problem, _ERRAND_WALK)
    errand = "delta" if free else "none"
    keys = Launch("backward_keys", "keys", "none", 0, heads)
    items = -(-problem.k_len // VALUES.block_n) * heads
    if heads == 1 or items < _ITEMS_OF_TWO or not _has_time(problem, 2 * _ERRAND_WALK):
        return Launch("backward_values", "values", errand, 0, heads), keys
    early = heads // 2
    return (
        Launch("backward_early_values", "values", errand, 0, early),
        keys,
        Launch("backward_late_values", "values", "dq", early, heads - early),
    )


def accumulator_columns(problem: Problem) -> int:
    """Columns of dQ's accumulator: those of q's tiles, or of its panels."""
    return 192 if pick(problem).panels else widths(problem)[0]


def exit_columns(problem: Problem) -> int:
    """Columns of the [64, C] parts in which dQ leaves and is accumulated: beside wide tiles no two of 64 fit."""
    dim, _ = widths(problem)
    return min(dim, 32 if pick(problem).groups == 1 else 64)


def cleared(problem: Problem) -> bool:
    """True where dQ's accumulator begins with zeros; else the first tile of keys that comes to a block stores it.

    In a fixed order each knows whether it is the first. Else, where each tile begins a few rows after the one before,
    only whoever leads has to say, block by block, that others may add. Where it has many before it, all follow at its
    pace: causal, head dim 128, 1024 546 us with zeros and 476 without, 4096 1227 and 1204, 16384 4256 and 4317; 256
    696 and 634, 1732 and 1733, 6070 and 6254. Nothing is gained at head dim 64, whose dQ group loads as well: 571 and
    571.
    """
    left, right = problem.window_left, problem.window_right
    if problem.deterministic:
        return turn(problem) > 1
    if goes_around(problem):
        return False
    if problem.table or right is None or problem.k_len > problem.q_len:
        return True
    width = max(widths(problem))
    # Most packed sequences are shorter than the longest one; and 64 rows of 128 columns are passed on soon.
    longest = problem.q_len // 2 if problem.varlen or width <= 128 else problem.q_len
    if left is not None:
        longest = min(longest, left + right)
    return width <= 64 or longest > _LONG_WALK


def goes_around(problem: Problem) -> bool:
    """True where the first query tile of a walk is one of its own, and the walk comes to those before it at the end.

    Without a mask all tiles of keys would else come to a block of dQ together, and all but one wait until it is stored.
    Only where consumers need not know which rows they have. Head dim 128, full, with zeros and so: 1024 735 us and 705,
    2048 1226 and 1194, 4096 2259 and 2238, 16384 8706 and 8730; 256 1009 and 1002, 3199 and 3219, 12168 and 12437.
    """
    if problem.deterministic or problem.varlen or not configs.unmasked(problem):
        return False
    whole = problem.k_len % pick(problem).block_n == 0 and problem.k_len <= problem.q_len <= 2 * _LONG_WALK
    nameless = problem.bias is None and not problem.alibi and problem.dropout_p == 0
    return whole and nameless and 64 < max(widths(problem)) <= 128


def cleared_by(problem: Problem) -> str:
    """The kernel that clears dQ's accumulator: the "prologue", the first of two or three `launches`, or "none"."""
    if not cleared(problem):
        return "none"
    first, *others = launches(problem)
    return first.name if others else "prologue"


def turn(problem: Problem) -> int:
    """Blocks of dQ that a tile of keys passes on together to the next one in a deterministic call; 0 in others.

    Pairs where no warp is left to pass on, which takes a good part of a step: causal, head dim 64, 4096 1535 us in
    pairs and 1720 one by one. Under a left bound a tile may end within a pair that the next one skips.
    """
    if not problem.deterministic:
        return 0
    notifies = pick(problem).groups < 3
    return 1 if notifies or problem.table or problem.window_left is not None else 2


def counts_blocks(problem: Problem) -> bool:
    """True where a number is kept for each block of dQ: see backward_turns.py."""
    return problem.deterministic or not cleared(problem)


def room_for_bias(problem: Problem) -> bool:
    """True where tiles of a bias find shared memory, and are whole: at a packed sequence's end they hold more rows and
    keys than it has.
    """
    return max(problem.qk_dim, problem.v_dim) <= 128 and not problem.varlen


def _rotates(problem: Problem) -> bool:
    """True where keys and values have tiles of one width, and items so few steps that it counts what lies between."""
    one_width = configs.width(problem.qk_dim) == configs.width(problem.v_dim)
    return one_width and (problem.varlen or not configs.unmasked(problem))


def _narrow_values(problem: Problem) -> bool:
    """True where keys come in panels and values are narrower, as in latent attention."""
    wide = 128 < problem.qk_dim <= 192 and 64 < problem.v_dim <= 128
    return wide and problem.softcap == 0 and problem.bias is None


def _has_time(problem: Problem, rows: int) -> bool:
    """True where nothing but dS depends on a row's delta, and walks for dV of so many rows leave time for errands.

    Against neither errand, full / causal: 512 rows, delta 0.99 / 0.96 times as fast; 1024, delta 1.03 / 1.03, both 1.03
    / 0.96; 2048, delta 1.01 / 1.02, both 1.04 / 1.04.
    """
    return problem.bare and problem.window_left is None and min(problem.q_len, problem.k_len) >= rows


def _serves(row: Row, problem: Problem, bias_tiles: bool) -> bool:
    if max(problem.qk_dim, problem.v_dim) > row.max_dim or row.bias_tiles < bias_tiles:
        return False
    if row.config.groups == 3 and mirrors(problem):
        return False
    return (_rotates(problem) or not row.config.rotates) and (_narrow_values(problem) or not row.config.panels)


def pick(problem: Problem, bias_tiles: bool = False, makes: str = "") -> Config:
    """Tiles and roles of the backward kernel. bias_tiles: a bias comes by TMA; makes: of one of the `launches`, the
    one of dQ if none is named.
    """
    if makes == "values":
        return VALUES_AND_ERRANDS if _has_time(problem, _ERRAND_WALK) else VALUES
    for row in BACKWARD:
        if _serves(row, problem, bias_tiles):
            return row.config
    raise LookupError(f"no tile sizes for {problem}: the last rows of the table must serve every problem")
