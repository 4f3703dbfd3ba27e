"""The online softmax (FlashAttention-2, Dao 2023, 3.1) of key tiles whose scores a warp group holds in registers.

A row's weights may be taken against any number near its maximum, for their sum divides them in the end. So a tile is
weighed against the maximum that its rows had before, at once: no search for a maximum, no exchange between threads, no
rescaling. Where the sum of a thread's weights shows that a score is far above that number, or that the number is -inf
or a score NaN, its warp looks for the maximum, goes on from that, and weighs again. What a branch of one warp cannot
say in Gluon is said in PTX.

State of the rows between tiles, m (maxima) and l (sums), is [64, 4]: one value for each of the four threads that share
a row, equal in m, and in l each thread's own part of the sum.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.scores import MINUS_INFINITY
from flashtile.backends.hopper.tiles import accumulator, partial_sums


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
    CODE: gl.constexpr = _weigh_code(N // 2, PIECES)
    OPERANDS: gl.constexpr = _weigh_operands(N // 2)
    p, more = gl.inline_asm_elementwise(
        CODE, OPERANDS, [s, _spread(m, N), _spread(l, N), unit], (gl.float32, gl.float32), is_pure=False, pack=N // 2
    )
    # What the code leaves in a thread's first eight elements: m and l of both rows, then the factor of both.
    even, odd = gl.split(more.reshape([64, N // 8, 4, 2]))
    m_new, shrunk = _first_two(even)
    l_new, _ = _first_two(odd)
    STATE: gl.constexpr = l.type.layout
    return p, gl.convert_layout(m_new, STATE), gl.convert_layout(l_new, STATE), gl.convert_layout(shrunk, STATE)


@gluon.jit
def shrink(o, by):
    """O times a factor of each row [64, 4], by the warps in which one of the factors is not 1."""
    N: gl.constexpr = o.shape[1]
    return gl.inline_asm_elementwise(
        _shrink_code(N // 2), _shrink_operands(N // 2), [o, _spread(by, N)], gl.float32, is_pure=False, pack=N // 2
    )


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


# No thread keeps weights of a row whose sum is larger: each is far from overflow in float16.
_LIMIT = gl.constexpr("0f44800000")  # 1024


@gluon.constexpr_function
def _weigh_code(COUNT, PIECES):
    """PTX of a thread's COUNT scores, $S to weights, $P; of each four elements, two belong to either row."""
    P, MORE, S, M, L, UNIT = (COUNT * i for i in range(6))
    limit = _LIMIT.value
    lines = [".reg .pred far, none;", ".reg .f32 sum<4>, base<2>, m<2>, l<2>, shrunk<2>, x, t;"]

    def row(i):
        return i >> 1 & 1

    def weigh_piece(elements):
        for i in elements:
            lines.append(f"fma.rn.f32 ${P + i}, ${S + i}, ${UNIT}, base{row(i)};")
            lines.append(f"ex2.approx.ftz.f32 ${P + i}, ${P + i};")
            first = i < elements.start + 4
            lines.append(f"mov.f32 sum{i & 3}, ${P + i};" if first else f"add.f32 sum{i & 3}, sum{i & 3}, ${P + i};")
        lines.append("add.f32 sum0, sum0, sum1;")
        lines.append("add.f32 sum2, sum2, sum3;")

    def look_for_maximum(r, elements):
        """base and m of row r, and what the row's earlier sums and weights shrink by."""
        mine = [i for i in elements if row(i) == r]
        lines.append(f"mov.f32 x, ${S + mine[0]};")
        lines.extend(f"max.f32 x, x, ${S + i};" for i in mine[1:])
        for lane in (1, 2):
            lines.append(f"shfl.sync.bfly.b32 t, x, {lane}, 0x1f, 0xffffffff;")
            lines.append("max.f32 x, x, t;")
        lines.append(f"mul.f32 x, x, ${UNIT};")
        lines.append(f"max.f32 x, x, m{r};")
        lines.append("setp.eq.f32 none, x, 0fFF800000;")
        lines.append("selp.f32 t, 0f00000000, x, none;")
        lines.append(f"neg.f32 base{r}, t;")
        lines.append(f"sub.f32 t, m{r}, t;")
        lines.append("ex2.approx.ftz.f32 t, t;")
        lines.append(f"mov.f32 m{r}, x;")
        lines.append(f"mul.f32 l{r}, l{r}, t;")
        lines.append(f"mul.f32 shrunk{r}, shrunk{r}, t;")
        lines.extend(f"mul.f32 ${P + i}, ${P + i}, t;" for i in range(elements.start) if row(i) == r)

    for r in (0, 1):
        lines.append(f"mov.f32 m{r}, ${M + 2 * r};")
        lines.append(f"mov.f32 l{r}, ${L + 2 * r};")
        lines.append(f"mov.f32 shrunk{r}, 0f3F800000;")
    for k in range(PIECES):
        piece = range(COUNT // PIECES * k, COUNT // PIECES * (k + 1))
        # Anew for each piece: a row that has seen nothing has base 0 after its search, but must search again.
        lines.extend(f"neg.f32 base{r}, m{r};" for r in (0, 1))
        weigh_piece(piece)
        lines.append(f"setp.gtu.f32 far, sum0, {limit};")
        lines.append(f"setp.gtu.or.f32 far, sum2, {limit}, far;")
        lines.append("vote.sync.any.pred far, far, 0xffffffff;")
        lines.append(f"@!far bra.uni NEAR{k};")
        for r in (0, 1):
            look_for_maximum(r, piece)
        weigh_piece(piece)
        lines.append(f"NEAR{k}:")
        lines.append("add.f32 l0, l0, sum0;")
        lines.append("add.f32 l1, l1, sum2;")
    left = ["m0", "l0", "m1", "l1", "shrunk0", "0f00000000", "shrunk1"]
    left += ["0f00000000"] * (COUNT - len(left))
    lines.extend(f"mov.f32 ${MORE + i}, {value};" for i, value in enumerate(left))
    return "\n".join(["{", *lines, "}"])


@gluon.constexpr_function
def _weigh_operands(COUNT):
    return ",".join(["=&f"] * 2 * COUNT + ["f"] * 4 * COUNT)


@gluon.constexpr_function
def _shrink_code(COUNT):
    """PTX of a thread's COUNT elements; of each four, two belong to either row."""
    NEW, OLD, BY = (COUNT * i for i in range(3))
    lines = [".reg .pred some;"]
    lines.extend(f"mov.f32 ${NEW + i}, ${OLD + i};" for i in range(COUNT))
    lines.append(f"setp.neu.f32 some, ${BY}, 0f3F800000;")
    lines.append(f"setp.neu.or.f32 some, ${BY + 2}, 0f3F800000, some;")
    lines.append("vote.sync.any.pred some, some, 0xffffffff;")
    lines.append("@!some bra.uni DONE;")
    lines.extend(f"mul.f32 ${NEW + i}, ${OLD + i}, ${BY + i};" for i in range(COUNT))
    return "\n".join(["{", *lines, "DONE:", "}"])


@gluon.constexpr_function
def _shrink_operands(COUNT):
    return ",".join(["=&f"] * COUNT + ["f"] * 2 * COUNT)
