"""The online softmax (FlashAttention-2, Dao 2023, 3.1) of key tiles whose scores a warp group holds in registers.

A row's weights may be taken against any number near its maximum, for their sum divides them in the end. So a tile is
weighed against the maximum that its rows had before, at once: no search for a maximum, no exchange between threads, no
rescaling. What a score far above that number asks for is settled in one of two ways.

`weigh` keeps the scores. Where the sum of a thread's weights shows that one is far above, or that the number is -inf or
a score NaN, its warp looks for the maximum, goes on from that, and weighs again.

`weigh_in_place` lets weights take the scores' registers. Weights may become as large as their dtype allows. bfloat16
has the range of float32; in float16 a warp with a large sum divides its rows by a power of two before the next tile.
What grows beyond that shows in the row's sum at the end of the item (`overflowed`), which is then done again with a
search for the maximum before each tile: in bfloat16 where a score is 44 above the first tile's maximum, in float16
where one is 11 above that of the tiles before, or less, at worst 3, where their sum was nearly large.

What a branch of one warp cannot say in Gluon is said in PTX.

State of the rows between tiles, m (maxima) and l (sums), is [64, 4]: one value for each of the four threads that share
a row, equal in m, and in l each thread's own part of the sum.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.scores import MINUS_INFINITY
from flashtile.backends.hopper.tiles import accumulator, partial_sums
from flashtile.backends.hopper.weighing import in_place, keeping, operands, shrinking


@gluon.jit
def weigh_first(s, unit, m):
    """(P, m, l) of an item's first tile, scores of which are s times unit; m [64]: the logits of sinks, or -inf."""
    m = gl.maximum(m, gl.max(s, 1) * unit)
    p = gl.exp2(s * unit - gl.where(m == MINUS_INFINITY, 0.0, m)[:, None])
    l = partial_sums(p)
    m, _ = gl.broadcast(gl.convert_layout(m, gl.SliceLayout(1, l.type.layout))[:, None], l)
    return p, m, l


@gluon.jit
def weigh(s, unit, m, l, PIECES: gl.constexpr):
    """(P, m, l, what sums and products of earlier tiles shrink by) of a later tile; the last as [64, 4].

    PIECES: in how many a tile is weighed. Scores are kept until their sum has been seen: the more, the fewer registers.
    """
    N: gl.constexpr = s.shape[1]
    CODE: gl.constexpr = keeping(N // 2, PIECES)
    OPERANDS: gl.constexpr = operands(N // 2, 2, 4, 0)
    p, more = gl.inline_asm_elementwise(
        CODE, OPERANDS, [s, _spread(m, N), _spread(l, N), unit], (gl.float32, gl.float32), is_pure=False, pack=N // 2
    )
    m, l, shrunk = _left(more, l)
    return p, m, l, shrunk


@gluon.jit
def weigh_in_place(s, o, unit, m, l, search, DTYPE: gl.constexpr):
    """(P, O, m, l) of a later tile without keeping its scores; O, the products of earlier tiles, is shrunk at once.

    search: not 0 where each tile is to be weighed against the true maximum, which nothing exceeds. Rows that have seen
    nothing yet are in any case.
    """
    N: gl.constexpr = s.shape[1]
    CODE: gl.constexpr = in_place(N // 2, gl.float16 == DTYPE)
    OPERANDS: gl.constexpr = operands(N // 2, 3, 5, 1)
    p, more, wide = gl.inline_asm_elementwise(
        CODE, OPERANDS, [s, _spread(m, N), _spread(l, N), unit, _widen(o, N), search],
        (gl.float32, gl.float32, gl.float32), is_pure=False, pack=N // 2,
    )  # fmt: skip
    m, l, _ = _left(more, l)
    return p, _narrow(wide, o), m, l


@gluon.jit
def shrink(o, by):
    """O times a factor of each row [64, 4], by the warps in which one of the factors is not 1."""
    N: gl.constexpr = o.shape[1]
    CODE: gl.constexpr = shrinking(N // 2)
    OPERANDS: gl.constexpr = operands(N // 2, 1, 2, 0)
    return gl.inline_asm_elementwise(CODE, OPERANDS, [o, _spread(by, N)], gl.float32, is_pure=False, pack=N // 2)


@gluon.jit
def overflowed(total, DTYPE: gl.constexpr):
    """1 where weights of a row, whose sum is total, may have overflowed DTYPE or are NaN, else 0. In bfloat16 they are
    multiplied by values, up to 2^63 within float32.
    """
    MOST: gl.constexpr = 65504.0 if gl.float16 == DTYPE else 2.0**64
    return gl.where(total < MOST, 0, 1)


@gluon.jit
def _left(more, like):
    """What the code leaves in a thread's first eight elements: m and l of both rows, then the factor of both."""
    even, odd = gl.split(more.reshape([64, more.shape[1] // 8, 4, 2]))
    m, shrunk = _first_two(even)
    l, _ = _first_two(odd)
    STATE: gl.constexpr = like.type.layout
    return gl.convert_layout(m, STATE), gl.convert_layout(l, STATE), gl.convert_layout(shrunk, STATE)


@gluon.jit
def _widen(o, N: gl.constexpr):
    """[64, K] -> [64, N], of which a thread's first registers are o's and the others 0."""
    for _ in gl.static_range(_doublings(o.shape[1], N)):
        o = gl.join(o, gl.zeros_like(o)).permute((0, 2, 1)).reshape([64, 2 * o.shape[1]])
    return gl.convert_layout(o, accumulator(N))


@gluon.jit
def _narrow(wide, o):
    """The reverse, to the layout of o."""
    for _ in gl.static_range(_doublings(o.shape[1], wide.shape[1])):
        wide, _ = gl.split(wide.reshape([64, 2, wide.shape[1] // 2]).permute((0, 2, 1)))
    return gl.convert_layout(wide, o.type.layout)


@gluon.constexpr_function
def _doublings(K, N):
    return (N // K).bit_length() - 1


@gluon.jit
def _spread(x, N: gl.constexpr):
    """[64, 4] -> [64, N]: each thread's values of its two rows, in all its columns."""
    zeros = gl.zeros([64, N], gl.float32, accumulator(N)).reshape([64, N // 8, 4, 2])
    ALL: gl.constexpr = zeros.type.layout
    x = gl.convert_layout(x, gl.SliceLayout(1, gl.SliceLayout(3, ALL)))
    _, whole = gl.broadcast(zeros, x.expand_dims(1).expand_dims(3))
    return gl.convert_layout(whole.reshape([64, N]), accumulator(N))


@gluon.jit
def _first_two(x):
    """[64, K, 4] -> two [64, 4], the first of K and the second."""
    for _ in gl.static_range(_halvings(x.shape[1])):
        x, _ = gl.split(x.reshape([64, 2, x.shape[1] // 2, 4]).permute((0, 2, 3, 1)))
    return gl.split(x.permute((0, 2, 1)))


@gluon.constexpr_function
def _halvings(K):
    return K.bit_length() - 2
