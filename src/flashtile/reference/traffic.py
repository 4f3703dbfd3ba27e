"""Slow-memory traffic of attention algorithms: a counter that they run with, and the closed forms of what it counts.

Slow memory is where Q, K, V and O live (HBM on a GPU, DRAM on a CPU); fast memory holds one tile of each (SRAM, cache).
Everything is for one head and in elements, row statistics (l, m, L, D) among them. Dao et al. 2022, "FlashAttention",
theorem 2 gives the orders: Theta(N d + N^2) for standard attention, Theta(N^2 d^2 / M) for FlashAttention-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile import masks


@dataclass
class Traffic:
    """Counts elements that cross between slow and fast memory."""

    reads: int = 0
    writes: int = 0

    def load(self, tensor: Tensor) -> Tensor:
        """A copy in fast memory of a tensor in slow memory."""
        self.reads += tensor.numel()
        return tensor.clone()

    def store(self, place: Tensor, value: Tensor | float) -> None:
        """Writes a value to its place in slow memory."""
        self.writes += place.numel()
        place[...] = value

    @property
    def total(self) -> int:
        return self.reads + self.writes


class Shape(NamedTuple):
    """One head: lengths of queries and keys, head dims of keys and values, rows of a query tile (B_r) and of a key tile
    (B_c), and the mask.
    """

    q_len: int
    k_len: int
    dim: int
    v_dim: int
    block_q: int
    block_k: int
    mask: masks.Mask | None = None

    @property
    def query_tiles(self) -> int:
        """T_r."""
        return -(-self.q_len // self.block_q)

    @property
    def key_tiles(self) -> int:
        """T_c."""
        return -(-self.k_len // self.block_k)


def standard_forward(shape: Shape) -> Traffic:
    """S = Q K^T, P = softmax(S), O = P V, each from and to slow memory (Dao et al. 2022, algorithm 0)."""
    n, m, d, d_v = shape[:4]
    return Traffic(reads=n * d + m * d + n * m + n * m + m * d_v, writes=n * m + n * m + n * d_v)


def standard_backward(shape: Shape) -> Traffic:
    """dV, dP, dS, dQ and dK in five steps, P kept by the forward (Dao et al. 2022, algorithm 3)."""
    n, m, d, d_v = shape[:4]
    reads = (n * m + n * d_v) + (n * d_v + m * d_v) + 2 * n * m + (n * m + m * d) + (n * m + n * d)
    return Traffic(reads=reads, writes=m * d_v + n * m + n * m + n * d + m * d)


def fa1_forward(shape: Shape) -> Traffic:
    """K and V once; Q, O, l and m once for each of the T_c key tiles; O, l and m as often (algorithm 2)."""
    n, m, d, d_v = shape[:4]
    state = n * d_v + 2 * n
    return Traffic(reads=m * (d + d_v) + shape.key_tiles * (n * d + state), writes=state + shape.key_tiles * state)


def fa1_backward(shape: Shape) -> Traffic:
    """K, V, dK and dV once; Q, O, dO, dQ, l and m once for each of the T_c key tiles (algorithm 4)."""
    n, m, d, d_v = shape[:4]
    per_tile = n * d + 2 * n * d_v + n * d + 2 * n
    return Traffic(
        reads=m * (d + d_v) + shape.key_tiles * per_tile,
        writes=n * d + shape.key_tiles * n * d + m * (d + d_v),
    )


def fa2_forward(shape: Shape) -> Traffic:
    """Q, O and L once; K and V once for each of the T_r query tiles, as far as its rows see (Dao 2023, algorithm 1)."""
    n, _, d, d_v = shape[:4]
    keys = sum(_rows_in(tiles, shape.block_k, shape.k_len) for tiles in key_tiles_seen(shape))
    return Traffic(reads=n * d + keys * (d + d_v), writes=n * d_v + n)


def fa2_backward(shape: Shape) -> Traffic:
    """D first; K, V, dK and dV once; Q, dO, dQ, L and D once for each key tile that their rows see (algorithm 2)."""
    n, m, d, d_v = shape[:4]
    queries = sum(_rows_in(tiles, shape.block_q, shape.q_len) for tiles in query_tiles_seeing(shape))
    return Traffic(
        reads=2 * n * d_v + m * (d + d_v) + queries * (d + d_v + d + 2),
        writes=n + n * d + queries * d + m * (d + d_v),
    )


def fa1_block_sizes(fast_memory: int, dim: int) -> tuple[int, int]:
    """(B_r, B_c) for a fast memory of M elements: B_c = ceil(M / 4d), B_r = min(B_c, d) (Dao et al. 2022, alg. 1)."""
    block_k = -(-fast_memory // (4 * dim))
    return min(block_k, dim), block_k


def interval_of_rows(shape: Shape, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(lo, hi) of every query row, int64 (q_len,)."""
    mask = masks.Full() if shape.mask is None else shape.mask
    lowered = masks.lower(mask, shape.q_len, shape.k_len, device)
    lo, hi = masks.interval_rows(lowered, shape.q_len, shape.k_len, device)
    return lo[0], hi[0]


def key_tiles_seen(shape: Shape) -> list[range]:
    """For each query tile the key tiles that one of its rows may see: [lo(first row), hi(last row)) in tiles."""
    lo, hi = interval_of_rows(shape)
    first = range(0, shape.q_len, shape.block_q)
    last = [min(row + shape.block_q, shape.q_len) - 1 for row in first]
    return [_tiles(int(lo[a]), int(hi[b]), shape.block_k) for a, b in zip(first, last, strict=True)]


def query_tiles_seeing(shape: Shape) -> list[range]:
    """For each key tile the query tiles with a row that may see it, by the transposed bounds."""
    lo, hi = interval_of_rows(shape)
    first, end = masks.rows_seeing(lo[None], hi[None], shape.k_len)
    start = range(0, shape.k_len, shape.block_k)
    last = [min(key + shape.block_k, shape.k_len) - 1 for key in start]
    return [_tiles(int(first[0, a]), int(end[0, b]), shape.block_q) for a, b in zip(start, last, strict=True)]


def _tiles(start: int, end: int, block: int) -> range:
    return range(start // block, -(-end // block)) if end > start else range(0)


def _rows_in(tiles: range, block: int, length: int) -> int:
    """Rows of a range of tiles, of which the last may be cut short."""
    return min(tiles.stop * block, length) - tiles.start * block if tiles else 0
