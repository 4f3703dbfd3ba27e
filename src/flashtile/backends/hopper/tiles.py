"""Layouts, and what forward and backward do with a tile of scores in registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def accumulator(N):
    """The layout of a [64, N] product of one warpgroup."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])


@gluon.constexpr_function
def left_operand(N):
    """The layout of a 16-bit left operand in registers, whose product is [64, N]: free to make from an accumulator."""
    return gl.DotOperandLayout(operand_index=0, parent=accumulator(N), k_width=2)


@gluon.jit
def partial_sums(p):
    """[64, 4]: each thread's own part of the row sums of p [64, N], which costs no exchange between threads."""
    N: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(p.reshape([64, N // 8, 4, 2]), 3), 1)
