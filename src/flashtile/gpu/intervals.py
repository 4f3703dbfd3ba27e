"""Masks as the kernels see them: which keys a row sees, which rows see a key, and which tiles need the comparison.

Masks come in three compile-time kinds: "none", "band" (a distance on either side of the diagonal) and "table" (one
interval per row in memory). Every kind gives each row one interval, so a partial tile costs at most two comparisons.
"""

import triton
import triton.language as tl


@triton.jit
def interval(row, q_len, k_len, left, right, lo, hi, KIND: tl.constexpr):
    """[begin, end) of the keys that a row sees, in keys; row is a scalar or a tensor of rows below q_len."""
    if KIND == "table":
        begin = tl.load(lo + row)
        end = tl.minimum(tl.load(hi + row), k_len)
    elif KIND == "band":
        position = row + (k_len - q_len)
        begin = tl.minimum(tl.maximum(position - left, 0), k_len)
        end = tl.minimum(tl.maximum(position + right + 1, 0), k_len)
    else:
        begin = row * 0
        end = row * 0 + k_len
    return begin, end


@triton.jit
def key_interval(key, q_len, k_len, left, right, first, end, KIND: tl.constexpr):
    """[first, end) of the rows that see a key: the transposed mask (masks.rows_seeing where it is a table)."""
    if KIND == "table":
        begin = tl.load(first + key)
        stop = tl.minimum(tl.load(end + key), q_len)
    elif KIND == "band":
        position = key - (k_len - q_len)
        begin = tl.minimum(tl.maximum(position - right, 0), q_len)
        stop = tl.minimum(tl.maximum(position + left + 1, 0), q_len)
    else:
        begin = key * 0
        stop = key * 0 + q_len
    return begin, stop


@triton.jit
def split(begin_first, end_first, begin_last, end_last, BLOCK: tl.constexpr):
    """Where a tile's walk over the other side starts, becomes unmasked, becomes masked again, and ends.

    The arguments are the intervals of the tile's first and last line; both bounds are non-decreasing, so what every
    line sees is [begin_last, end_first) and what any line sees is [begin_first, end_last).
    """
    start = begin_first // BLOCK * BLOCK
    stop = tl.maximum(end_last, start)
    full = tl.minimum((begin_last + BLOCK - 1) // BLOCK * BLOCK, (stop + BLOCK - 1) // BLOCK * BLOCK)
    full = tl.maximum(full, start)
    partial = tl.maximum(end_first // BLOCK * BLOCK, full)
    return start, full, partial, stop
