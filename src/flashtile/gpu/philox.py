"""Dropout's random bits on the device, as flashtile.dropout defines them."""

import triton
import triton.language as tl

from flashtile import dropout

_ROUNDS = tl.constexpr(dropout.ROUNDS)
_MULTIPLIER_0 = tl.constexpr(dropout.MULTIPLIER_0)
_MULTIPLIER_1 = tl.constexpr(dropout.MULTIPLIER_1)
_WEYL_0 = tl.constexpr(dropout.WEYL_0)
_WEYL_1 = tl.constexpr(dropout.WEYL_1)


@triton.jit
def _multiply_wide(a, B: tl.constexpr):
    product = a.to(tl.uint64) * B
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def random_state(rng, DROPOUT: tl.constexpr):
    """(low half of the seed, its high half, low half of the offset); zeros without dropout."""
    low = tl.cast(0, tl.uint32)
    high = tl.cast(0, tl.uint32)
    offset = tl.cast(0, tl.uint32)
    if DROPOUT:
        seed = tl.load(rng)
        low = seed.to(tl.uint32)
        high = (seed >> 32).to(tl.uint32)
        offset = tl.load(rng + 1).to(tl.uint32)
    return low, high, offset


@triton.jit
def random_words(first_row, line, first_col, lane, batch_head, state):
    """Of each element of a tile, the 32 random bits that it shares with its neighbour in the row: an even column's are
    the low half (flashtile.dropout says how).

    The tile starts at (first_row, first_col), multiples of its size; line and lane count from there, broadcast to it.
    The counters of eight elements in one thread are equal, and the compiler computes equal values once. To see that
    they are, it needs an index taken apart into the bits that differ between threads and those that do not.
    """
    k0, k1, c3 = state
    c0 = (first_row | (line & 1) | (line & 6) | (line & 48) | (line & ~63)).to(tl.uint32)  # without bit 3
    c1 = (first_col | (lane & 6) | (lane & 48) | (lane & ~63)).to(tl.uint32)  # without bits 0 and 3
    c2 = batch_head.to(tl.uint32)
    for _ in tl.static_range(_ROUNDS):
        high_0, low_0 = _multiply_wide(c0, _MULTIPLIER_0)
        high_1, low_1 = _multiply_wide(c2, _MULTIPLIER_1)
        c0 = high_1 ^ c1 ^ k0
        c2 = high_0 ^ c3 ^ k1
        c1 = low_1
        c3 = low_0
        k0 = (k0.to(tl.uint64) + _WEYL_0).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + _WEYL_1).to(tl.uint32)
    return tl.where((line & 8) != 0, tl.where((lane & 8) != 0, c3, c2), tl.where((lane & 8) != 0, c1, c0))


@triton.jit
def keep(first_row, line, first_col, lane, batch_head, state, threshold):
    """Which elements of a tile dropout keeps; the arguments before the threshold are those of `random_words`."""
    word = random_words(first_row, line, first_col, lane, batch_head, state)
    # The half that counts moves to the top; what stays below it never changes the comparison.
    return tl.where((lane & 1) != 0, word, word << 16) >= (threshold.to(tl.uint32) << 16)
