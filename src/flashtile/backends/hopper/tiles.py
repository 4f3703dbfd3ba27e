"""Layouts, and what forward and backward do with a tile of scores in registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma


@gluon.constexpr_function
def accumulator(N):
    """The layout of a [64, N] product of one warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])


@gluon.constexpr_function
def left_operand(N):
    """The layout of a 16-bit left operand in registers, whose product is [64, N]: free to make from an accumulator."""
    return gl.DotOperandLayout(operand_index=0, parent=accumulator(N), k_width=2)


@gluon.constexpr_function
def pieces(DIM, WIDTH):
    """(first column, columns) of the powers of two that DIM is a sum of; one where none begins at a multiple of 64."""
    found, start, rest = [], 0, DIM
    while rest > 64:
        size = 1 << (rest.bit_length() - 1)
        found.append((start, size))
        start, rest = start + size, rest - size
    if rest:
        found.append((start, max(16, 1 << (rest - 1).bit_length())))
    return found if sum(size for _, size in found) < WIDTH else [(0, WIDTH)]


@gluon.constexpr_function
def _number_of_pieces(DIM, WIDTH):
    return len(pieces(DIM, WIDTH))


@gluon.constexpr_function
def _first_column(DIM, WIDTH, i):
    return pieces(DIM, WIDTH)[i][0]


@gluon.constexpr_function
def _columns(DIM, WIDTH, i):
    return pieces(DIM, WIDTH)[i][1]


@gluon.jit
def row_products(a, b, DIM: gl.constexpr):
    """a b^T of tiles of rows in shared memory, whose columns from DIM on are 0 and left out; running."""
    ROWS: gl.constexpr = a.shape[0]
    N: gl.constexpr = b.shape[0]
    running = gl.zeros([ROWS, N], gl.float32, accumulator(N))
    return add_row_products(running, a, b, DIM, False)


@gluon.jit
def add_row_products(running, a, b, DIM: gl.constexpr, ADD: gl.constexpr):
    """The same added to a product that is running; not ADD: in its place."""
    WIDTH: gl.constexpr = a.shape[1]
    for i in gl.static_range(_number_of_pieces(DIM, WIDTH)):
        left = a.slice(_first_column(DIM, WIDTH, i), _columns(DIM, WIDTH, i), dim=1)
        right = b.slice(_first_column(DIM, WIDTH, i), _columns(DIM, WIDTH, i), dim=1)
        running = warpgroup_mma(left, right.permute((1, 0)), running, use_acc=ADD or i > 0, is_async=True)
    return running


@gluon.jit
def partial_sums(p):
    """[64, 4]: each thread's own part of the row sums of p [64, N], which costs no exchange between threads."""
    N: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(p.reshape([64, N // 8, 4, 2]), 3), 1)
