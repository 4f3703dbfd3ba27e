"""Dropout's random mask: one definition that every backend computes, element by element, from a counter.

The 16 random bits of element (batch, head, row, column) come from Philox-4x32 with 7 rounds (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011, table 2: the fewest rounds that pass BigCrush) with

    key     = the two halves of rng[0] (the seed)
    counter = (row without bit 3, column without bits 0 and 3, batch * heads + head, low half of rng[1] (the offset))
    word    = 2 * (bit 3 of row) + (bit 3 of column)
    half    = bit 0 of column

An element is dropped where its 16 bits are below `threshold(dropout_p)`, dropout_p in units of 1 / 65536. Nothing
depends on tile sizes, so forward and backward of every backend drop the same elements and never store the mask. One
Philox call serves eight elements; these eight lie in one thread of a tensor-core accumulator, which is why the bits are
dealt this way.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def draw(device: torch.device) -> Tensor:
    """A fresh (seed, offset), int64[2] on `device`, from PyTorch's own generator (torch.manual_seed rules it)."""
    return torch.randint(0, 2**63 - 1, (2,), device=device, dtype=torch.int64)


def threshold(dropout_p: float) -> int:
    """Elements with random bits below this are dropped; 0 drops none, 65536 all, which only dropout_p = 1 does."""
    return 65536 if dropout_p == 1.0 else min(round(dropout_p * 65536), 65535)


def keep_mask(rng: Tensor, dropout_p: float, batch_head: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Which elements stay, boolean, in the shape that batch_head, row and column (int64) broadcast to.

    batch_head is batch * heads + head; row and column count from 0 within the sequence.
    """
    c0, c1, c2 = torch.broadcast_tensors(row & ~8, column & ~9, batch_head & _LOW)
    c3 = (rng[1] & _LOW).expand_as(c0)
    words = _philox(c0 & _LOW, c1 & _LOW, c2, c3, rng[0] & _LOW, (rng[0] >> 32) & _LOW)
    low = torch.where((column & 8) != 0, words[1], words[0])
    high = torch.where((column & 8) != 0, words[3], words[2])
    word = torch.where((row & 8) != 0, high, low)
    bits = torch.where((column & 1) != 0, word >> 16, word) & 0xFFFF
    return bits >= threshold(dropout_p)


def keep_tile(
    rng: Tensor, dropout_p: float, batch_head: Tensor, rows: tuple[int, int], columns: tuple[int, int]
) -> Tensor:
    """`keep_mask` of the rows and columns [first, end) of a tile, boolean, (*batch_head.shape, rows, columns).

    It calls Philox once for the eight elements that share a call, where `keep_mask` calls it for each.
    """
    # Blocks of 16 x 16 elements, in which bit 3 of a row and bits 3 and 0 of a column pick the word and its half.
    tops, lefts = (torch.arange(first // 16, -(-end // 16), device=rng.device) * 16 for first, end in (rows, columns))
    eight = torch.arange(8, device=rng.device)
    row, column = (tops[:, None] + eight).flatten(), (lefts[:, None] + 2 * eight[:4]).flatten()
    counters = (row[:, None], column, batch_head[..., None, None] & _LOW, rng[1] & _LOW)
    words = _philox(*counters, rng[0] & _LOW, (rng[0] >> 32) & _LOW)
    shape = (*batch_head.shape, len(tops), 8, len(lefts), 4)
    keep = torch.empty((*batch_head.shape, len(tops), 2, 8, len(lefts), 2, 4, 2), dtype=torch.bool, device=rng.device)
    dropped_below = threshold(dropout_p)
    for index, word in enumerate(words):
        word = word.expand(*batch_head.shape, len(row), len(column)).view(shape)
        halves = keep[..., index // 2, :, :, index % 2, :, :]
        halves[..., 0] = (word & 0xFFFF) >= dropped_below
        halves[..., 1] = word >= dropped_below << 16
    whole = keep.view(*batch_head.shape, len(tops) * 16, len(lefts) * 16)
    top, left = rows[0] % 16, columns[0] % 16
    return whole[..., top : top + rows[1] - rows[0], left : left + columns[1] - columns[0]]


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> tuple[Tensor, ...]:
    """Philox-4x32 on uint32 values held in int64: products wrap modulo 2**64, so the high word needs one mask."""
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c2 = ((product_1 >> 32) & _LOW) ^ c1 ^ k0, ((product_0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = product_1 & _LOW, product_0 & _LOW
        k0, k1 = (k0 + WEYL_0) & _LOW, (k1 + WEYL_1) & _LOW
    return c0, c1, c2, c3
