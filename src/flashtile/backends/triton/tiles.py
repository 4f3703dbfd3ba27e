"""Device helpers of these kernels alone: pointers, loads, products and zeros."""

import triton
import triton.language as tl


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
