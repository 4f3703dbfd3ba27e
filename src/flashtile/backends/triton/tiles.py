"""Device helpers that the kernels share: loads, scores, mask intervals, dropout, and the walk over programs.

Masks come in three compile-time kinds: "none", "band" (a distance on either side of the diagonal) and "table" (one
interval per row in memory). Every kind gives each row one interval, so a partial tile costs at most two comparisons.
"""

import triton
import triton.language as tl

from flashtile import dropout

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
UNLIMITED = tl.constexpr(2**30)

_ROUNDS = tl.constexpr(dropout.ROUNDS)
_MULTIPLIER_0 = tl.constexpr(dropout.MULTIPLIER_0)
_MULTIPLIER_1 = tl.constexpr(dropout.MULTIPLIER_1)
_WEYL_0 = tl.constexpr(dropout.WEYL_0)
_WEYL_1 = tl.constexpr(dropout.WEYL_1)


@triton.jit
def place(tiles, heads_total, section):
    """(tile, batch_head) of this program: the heads of one section walk through their tiles together.

    A section is as many heads as have their keys and values in the L2 cache at once; within it the first programs get
    the first tile of every head.
    """
    program = tl.program_id(0)
    size = tiles * section
    first = (program // size) * section
    here = tl.minimum(section, heads_total - first)
    within = program % size
    return within // here, first + within % here


@triton.jit
def sequence(cu_seqlens, b, longest, total, code, mailbox, VARLEN: tl.constexpr, CHECK: tl.constexpr):
    """(start, length) of sequence b. Bad contents are cut to what is in bounds and reported to the mailbox."""
    if VARLEN:
        start = tl.load(cu_seqlens + b)
        end = tl.load(cu_seqlens + b + 1)
        if CHECK:
            if (end < start) | ((b == 0) & (start != 0)):
                tl.store(mailbox + code, 1)
            if (end > total) | (end - start > longest):
                tl.store(mailbox + code + 1, 1)
        start = tl.minimum(tl.maximum(start, 0), total)
        length = tl.minimum(tl.minimum(tl.maximum(end - start, 0), longest), total - start)
    else:
        start = 0
        length = longest
    return start, length


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


@triton.jit
def span(SIZE: tl.constexpr, WIDE: tl.constexpr):
    """0, 1, ..., SIZE - 1; 64-bit where a tile's own offsets pass 2**31 elements, which costs registers."""
    index = tl.arange(0, SIZE)
    if WIDE:
        index = index.to(tl.int64)
    return index


@triton.jit
def offsets(line, column, line_stride, column_stride):
    """Element offsets within a tile: [lines, columns] from a column vector and a row vector of indices."""
    return line * line_stride + column * column_stride


@triton.jit
def scratch_row(b, h, heads, q_start, padded, VARLEN: tl.constexpr):
    """Where a sequence's rows start in the backward's scratch; every sequence has room up to a multiple of 128 rows."""
    if VARLEN:
        at = h * padded + (q_start + 128 * b) // 128 * 128
    else:
        at = (b * heads + h) * padded
    return tl.multiple_of(at, 128)


@triton.jit
def load_tile(pointers, line, lines, column, COLUMNS: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr):
    """A tile, 0 where it leaves the tensor; MASKED says that lines may, EVEN that columns (a head dim) never do."""
    if EVEN:
        if MASKED:
            return tl.load(pointers, mask=line < lines, other=0.0)
        return tl.load(pointers)
    if MASKED:
        return tl.load(pointers, mask=(line < lines) & (column < COLUMNS), other=0.0)
    return tl.load(pointers, mask=column < COLUMNS, other=0.0)


@triton.jit
def load_bias(pointers, row, q_len, col, k_len, ALIGN: tl.constexpr):
    """A tile of the bias. Where its rows are multiples of ALIGN elements so is k_len; saying so keeps loads wide."""
    return tl.load(pointers, mask=(row < q_len) & (col < k_len // ALIGN * ALIGN), other=0.0)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b in float32. WIDEN: Triton's interpreter multiplies bfloat16 wrongly, so there operands are widened."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def dot_add(a, b, accumulator, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """accumulator + a @ b in float32."""
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def tanh(x, KIND: tl.constexpr):
    """ "exact": within four units of the last place; "fast": one instruction, relative error 2**-11."""
    if KIND == "fast":
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    # Near 0 the exponential loses the digits that a softcap multiplies again; Lambert's fraction keeps them there.
    square = x * x
    near = x * (945.0 + square * (105.0 + square)) / (945.0 + square * (420.0 + 15.0 * square))
    return tl.where(tl.abs(x) < 0.6, near, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def score(
    s, row, col, diagonal, scale, softcap, slope, bias_tile,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """(scores in base 2, tanh of the softcap) from raw products; row and col broadcast to the shape of s."""
    capped = s
    if SOFTCAP != "none":
        capped = tanh(s * (scale / softcap), SOFTCAP)
        s = capped * (softcap * LOG2E)
    else:
        s = s * (scale * LOG2E)
    if ALIBI:
        # Positions as floats: exact below 2**24, and |x| is free in a multiply-add.
        s -= tl.abs((row + diagonal).to(tl.float32) - col.to(tl.float32)) * (slope * LOG2E)
    if BIAS == "additive":
        s += bias_tile.to(tl.float32) * LOG2E
    elif BIAS == "boolean":
        s = tl.where(bias_tile != 0, s, -float("inf"))
    return s, capped


@triton.jit
def _multiply_wide(a, B: tl.constexpr):
    product = a.to(tl.uint64) * B
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def random_state(rng, DROPOUT: tl.constexpr):
    """(low half of the seed, its high half, low half of the offset); zeros without dropout."""
    low = tl.zeros([], tl.uint32)
    high = tl.zeros([], tl.uint32)
    offset = tl.zeros([], tl.uint32)
    if DROPOUT:
        seed = tl.load(rng)
        low = seed.to(tl.uint32)
        high = (seed >> 32).to(tl.uint32)
        offset = tl.load(rng + 1).to(tl.uint32)
    return low, high, offset


@triton.jit
def keep(first_row, line, first_col, lane, batch_head, state, threshold):
    """Which elements of a tile dropout keeps (flashtile.dropout says how).

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
    word = tl.where((line & 8) != 0, tl.where((lane & 8) != 0, c3, c2), tl.where((lane & 8) != 0, c1, c0))
    # The half that counts moves to the top; what stays below it never changes the comparison.
    return tl.where((lane & 1) != 0, word, word << 16) >= (threshold.to(tl.uint32) << 16)


@triton.jit
def past_end(cu_seqlens, batch, total):
    """The first line that belongs to no sequence."""
    return tl.minimum(tl.maximum(tl.load(cu_seqlens + batch), 0), total)


@triton.jit
def blank(
    target, start, total, tile, tiles, line_stride, column_stride, BLOCK: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Zeros for the lines past the last sequence; the tiles of one extra, empty sequence share them."""
    column = span(BLOCK_D, True)[None, :]
    for first in tl.range(start + tile * BLOCK, total, tiles * BLOCK):
        line = (first + span(BLOCK, True))[:, None]
        pointers = target + offsets(line, column, line_stride, column_stride)
        zeros = tl.zeros([BLOCK, BLOCK_D], target.dtype.element_ty)
        tl.store(pointers, zeros, mask=(line < total) & (column < D))
