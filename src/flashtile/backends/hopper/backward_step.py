"""What a consumer of the backward does: from the products S^T and dP^T of its 64 keys to P^T, dS^T, dV and dK."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtile.backends.hopper.backward_work import KEYS
from flashtile.backends.hopper.bias_tiles import add_tile, axis, store_tile
from flashtile.backends.hopper.dialect import PTXAS_13, aggregate, barrier
from flashtile.backends.hopper.tiles import accumulator, left_operand, partial_sums, row_products
from flashtile.gpu.philox import random_state, random_words
from flashtile.gpu.scores import LOG2E, score

MINUS_INFINITY = gl.constexpr(float("-inf"))
NEVER = gl.constexpr(2**30)


@aggregate
class Keys:
    """The 64 keys of a consumer and a query head: which they are, which rows see them, what their scores depend on."""

    turn: gl.tensor
    b: gl.tensor
    h: gl.tensor
    bh: gl.tensor
    first: gl.tensor
    lane: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    q_len: gl.tensor
    k_len: gl.tensor
    bias: gl.tensor
    slope: gl.tensor
    seed_low: gl.tensor
    seed_high: gl.tensor
    offset: gl.tensor
    mirrored: gl.tensor
    BLOCK_M: gl.constexpr
    MIRRORS: gl.constexpr

    @gluon.jit
    def line(self):
        """0, 1, ..., BLOCK_M - 1: the columns of a transposed tile of scores, which are query rows."""
        return gl.arange(0, self.BLOCK_M, layout=gl.SliceLayout(0, accumulator(self.BLOCK_M)))

    @gluon.jit
    def row(self, i):
        """The first query row that the walk comes to as tile i."""
        if self.MIRRORS:
            i = gl.where(self.mirrored, gl.cdiv(self.q_len, self.BLOCK_M) - 1 - i, i)
        return i * self.BLOCK_M


@gluon.jit
def keys_of(place, mask, scoring, g, WG: gl.constexpr):
    """The Keys of consumer WG and the g-th query head of the group."""
    first = place.key(WG)
    lane = gl.arange(0, KEYS, layout=gl.SliceLayout(1, accumulator(place.BLOCK_M)))
    begin, end = mask.seeing(first + lane, place)
    if mask.RAGGED:
        begin = gl.where(first + lane < place.k_len, begin, NEVER)
    h = place.head(g)
    low, high, offset = random_state(scoring.rng, scoring.DROPOUT)
    return Keys(
        place.turn, place.b, h, place.b * place.heads + h, first, lane, begin, end, place.q_len, place.k_len,
        scoring.bias_of(place.b, h), scoring.slope(place.b, h), low, high, offset, place.mirrored,
        place.BLOCK_M, place.MIRRORS,
    )  # fmt: skip


@aggregate
class BiasGradient:
    """Where dS goes for the gradient of a bias. KIND: as flashtile.gpu.bias_gradient has it, or "none".

    "tile" stores each value, "summed" adds it to what other batches and heads add there, "column" sums over the query
    rows: float32 (batch, heads, max_k). "boxes" leaves by TMA, stored (STORED) or added as float32. Strides are 0 where
    the bias is broadcast.
    """

    desc: tma.tensor_descriptor
    target: gl.tensor
    stride_b: gl.tensor
    stride_h: gl.tensor
    max_k: gl.tensor
    KIND: gl.constexpr
    STORED: gl.constexpr

    @gluon.jit
    def of_head(self, keys):
        return self.target + keys.b.to(gl.int64) * self.stride_b + keys.h.to(gl.int64) * self.stride_h

    @gluon.jit
    def take(self, ds, m, keys, scoring):
        """A tile of dS^T, the query rows from m."""
        base = self.of_head(keys) + m.to(gl.int64) * self.max_k
        line = keys.line()
        col = keys.first + keys.lane
        inside = (col < keys.k_len)[:, None] & (m + line < keys.q_len)[None, :]
        at = col[:, None] + line[None, :] * self.max_k
        if scoring.DROPOUT:
            ds = ds.to(gl.float32) * scoring.keep_scale
        value = ds.to(self.target.dtype.element_ty)
        if self.KIND == "tile":
            gl.store(base + at, value, mask=inside)
        else:
            gl.atomic_add(base + at, value, mask=inside, sem="relaxed")

    @gluon.jit
    def send(self, n, row, g, pipes, place, FROM: gl.constexpr, TO: gl.constexpr):
        """Done by the warp group that makes dQ: the dS of step n and of consumers FROM to TO starts on its way."""
        b, h = axis(place.b, self.stride_b), axis(place.head(g), self.stride_h)
        for w in gl.static_range(FROM, TO):
            at = [b, h, row, place.first_key + KEYS * w]
            ds = pipes.scores_of(n, w).permute((1, 0))
            if self.STORED:
                store_tile(self.desc, at, ds)
            else:
                add_tile(self.desc, at, ds, pipes.exit(n, pipes.SLOTS - 1))

    @gluon.jit
    def blank(self, pipes, place, spans):
        """Done by the same warp group, at an item's end: zeros for the pairs of its keys and of rows that see none."""
        FLAT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
        LINES: gl.constexpr = pipes.exits.shape[1]
        zeros = pipes.exits.index(0)
        tma.store_wait(0)
        barrier()
        zeros.store(gl.zeros([LINES, 256], gl.float32, FLAT))
        fence_async_shared()
        barrier()
        b = axis(place.b, self.stride_b)
        tiles = gl.cdiv(place.q_len, place.BLOCK_M)
        for g in range(place.together if pipes.GROUPED else 1):
            h = axis(place.head(g), self.stride_h)
            for w in gl.static_range(pipes.GROUPS):
                start, _, _, stop = spans[w]
                for i in range(tiles - (stop - start)):
                    row = gl.where(i < start, i, i + stop - start) * place.BLOCK_M
                    store_tile(self.desc, [b, h, row, place.first_key + KEYS * w], zeros)

    @gluon.jit
    def no_sums(self, BLOCK_M: gl.constexpr):
        """What `walk` starts its column sums with."""
        if self.KIND == "column":
            return partial_sums(gl.zeros([KEYS, BLOCK_M], gl.float32, accumulator(BLOCK_M)))
        else:
            return 0.0

    @gluon.jit
    def store_sums(self, sums, keys, scoring):
        total = gl.convert_layout(gl.sum(sums, 1), gl.SliceLayout(1, accumulator(keys.BLOCK_M)))
        if scoring.DROPOUT:
            total = total * scoring.keep_scale
        col = keys.first + keys.lane
        gl.store(self.of_head(keys) + col, total, mask=col < keys.k_len)


@gluon.jit
def load_bias(m, keys, scoring):
    """The bias of a transposed tile of scores; 0 where there is none to load by pointers."""
    if scoring.BIAS == "none" or scoring.BIAS_TILES:
        return 0.0
    else:
        line = keys.line()
        col = keys.first + keys.lane
        base = keys.bias + m.to(gl.int64) * scoring.stride_bm * scoring.BIAS_ALIGN
        at = col[:, None] * scoring.BIAS_STEP + line[None, :] * (scoring.stride_bm * scoring.BIAS_ALIGN)
        exists = col < keys.k_len // scoring.BIAS_ALIGN * scoring.BIAS_ALIGN
        return gl.load(base + at, mask=exists[:, None] & (m + line < keys.q_len)[None, :], other=0.0)


@gluon.jit
def kept_bits(m, keys, scoring):
    """[64, 4]: what dropout keeps of a tile, one bit for each value that a thread holds of a row; 0 without dropout.

    Made while S is being multiplied, when registers are free. A thread and the one that holds the neighbouring keys,
    four lanes away, need the same random words, each its own half of them: each makes the words of every other query
    row, decides for both, and hands over the neighbour's decisions.
    """
    if scoring.DROPOUT:
        N: gl.constexpr = keys.BLOCK_M
        odd = keys.lane & 1
        line = (keys.line() & ~1)[None, :] | odd[:, None]
        state = (keys.seed_low, keys.seed_high, keys.offset)
        words = random_words(m, line, keys.first, keys.lane[:, None], keys.bh, state)
        words, _ = words.reshape([KEYS, N // 8, 4, 2]).split()
        bit = 1 << gl.arange(0, N // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, words.type.layout)))[None, :, None]
        least = scoring.threshold.to(gl.uint32) << 16
        even_keys = gl.sum(gl.where((words << 16) >= least, bit, 0), 1)
        odd_keys = gl.sum(gl.where(words >= least, bit, 0), 1)
        odd = gl.convert_layout(odd, gl.SliceLayout(1, even_keys.type.layout))[:, None] != 0
        own = gl.where(odd, odd_keys, even_keys)
        handed = _from_neighbour(gl.where(odd, even_keys, odd_keys))
        return gl.where(odd, handed | (own << 16), own | (handed << 16))
    else:
        return 0


@gluon.jit
def _from_neighbour(x):
    """The value of the thread four lanes away."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 4, 31, -1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def kept(bits, keys):
    """The bits of `kept_bits` as booleans, [64, BLOCK_M]."""
    BLOCK_M: gl.constexpr = keys.BLOCK_M
    line = keys.line()
    places = gl.zeros([KEYS, BLOCK_M], gl.int32, accumulator(BLOCK_M)) + ((line >> 3) | ((line & 1) << 4))[None, :]
    chosen = (bits[:, None, :, None] >> places.reshape([KEYS, BLOCK_M // 8, 4, 2])) & 1
    return gl.convert_layout(chosen.reshape([KEYS, BLOCK_M]), accumulator(BLOCK_M)) != 0


@gluon.jit
def exponents(s, lse, bias, m, keys, mask, scoring, MASKED: gl.constexpr):
    """(log2 of P^T, tanh of the softcap) from raw products."""
    line = keys.line()
    capped = s
    PLAIN: gl.constexpr = scoring.SOFTCAP == "none" and scoring.BIAS == "none"
    ONLY_BIAS: gl.constexpr = scoring.SOFTCAP == "none" and scoring.BIAS == "additive" and not scoring.ALIBI
    if PLAIN and not scoring.ALIBI:
        x = s * (scoring.scale * LOG2E) - lse
    elif PLAIN and scoring.ORDERED:
        # Where a row sees only keys up to its own, the distance needs no absolute value and is a sum of two terms.
        # Positions count from the tile: what is near stays small, and floats hold it exactly.
        slope = keys.slope * LOG2E
        distance = (m + (keys.k_len - keys.q_len) - keys.first + line).to(gl.float32)
        x = (
            s * (scoring.scale * LOG2E)
            + (keys.lane.to(gl.float32) * slope)[:, None]
            - (lse + (distance * slope)[None, :])
        )
    elif ONLY_BIAS:
        x = s * (scoring.scale * LOG2E) + (bias.to(gl.float32) * LOG2E - lse)
    else:
        s, capped = score(
            s, (m + line)[None, :], (keys.first + keys.lane)[:, None], keys.k_len - keys.q_len, scoring.scale,
            scoring.softcap, keys.slope, bias, scoring.SOFTCAP, scoring.ALIBI, scoring.BIAS,
        )  # fmt: skip
        x = s - lse
    if MASKED:
        seen = line[None, :] >= (keys.begin - m)[:, None]
        if mask.LEFT:
            seen = seen & (line[None, :] < (keys.end - m)[:, None])
        x = gl.where(seen, x, MINUS_INFINITY)
    return x, capped


@gluon.jit
def _multiply(a, b):
    """a * b of 16-bit values, two at a time."""
    if a.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        return gl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2
        )


@gluon.jit
def score_gradients(p, dp, delta, scoring, NARROW: gl.constexpr):
    """dS^T = P^T (dP^T - delta) in 16 bits, before the softcap's derivative. P is negative where dropout drops it: its
    size counts, and dP is 0. NARROW: dP - delta is within what 16 bits hold.
    """
    if NARROW:
        difference = (dp - delta).to(p.dtype)
        if scoring.DROPOUT:
            zero = gl.zeros([KEYS, p.shape[1]], gl.float32, accumulator(p.shape[1]))
            return _signed_product(p, difference, (zero - delta).to(p.dtype))
        else:
            return _multiply(p, difference)
    else:
        return _wide_product(p, dp, delta, scoring.threshold >> 31, scoring.DROPOUT)


@gluon.jit
def _wide_product(p, dp, delta, zero, SIGNED: gl.constexpr):
    """|p| (dp - delta) of a float16 p, in float32: dP may be larger than float16 holds where P is small. SIGNED: dp
    counts as 0 where p is negative.

    zero: a 0 that the compiler does not know. With it P depends on dP; else P is widened before dP is there, and
    registers run out under the product.
    """
    HIDE: gl.constexpr = """
        .reg .pred dropped;
        setp.lt.f32 dropped, low, 0f00000000;
        selp.f32 first, 0f00000000, first, dropped;
        setp.lt.f32 dropped, high, 0f00000000;
        selp.f32 second, 0f00000000, second, dropped;
        abs.f32 low, low;
        abs.f32 high, high;"""
    PRODUCT: gl.constexpr = (
        """{
        .reg .b16 half0, half1;
        .reg .b32 both;
        .reg .f32 low, high, first, second;
        lop3.b32 both, $1, $2, $6, 0xF8;
        mov.b32 {half0, half1}, both;
        cvt.f32.f16 low, half0;
        cvt.f32.f16 high, half1;
        mov.f32 first, $2;
        mov.f32 second, $3;"""
        + (HIDE if SIGNED else "")
        + """
        sub.f32 first, first, $4;
        sub.f32 second, second, $5;
        mul.f32 first, first, low;
        mul.f32 second, second, high;
        cvt.rn.f16x2.f32 $0, second, first;
        }"""
    )
    return gl.inline_asm_elementwise(
        PRODUCT, "=r,r,f,f,f,f,r,r", [p, dp, delta, zero], dtype=gl.float16, is_pure=False, pack=2
    )


@gluon.jit
def _signed_product(p, kept, dropped):
    """|p| times `kept` where p is positive, times `dropped` where it is negative; 16 bits, two at a time."""
    MULTIPLY: gl.constexpr = "mul.rn.bf16x2" if p.dtype == gl.bfloat16 else "mul.rn.f16x2"
    PRODUCT: gl.constexpr = (
        """{
        .reg .b32 negative, factor, size;
        prmt.b32 negative, $1, 0, 0xBB99;
        lop3.b32 factor, negative, $3, $2, 0xCA;
        and.b32 size, $1, 0x7FFF7FFF;
        """
        + MULTIPLY
        + """ $0, size, factor;
        }"""
    )
    return gl.inline_asm_elementwise(PRODUCT, "=r,r,r,r", [p, kept, dropped], dtype=p.dtype, is_pure=True, pack=2)


@gluon.jit
def positive(p):
    """What is positive of 16-bit values, 0 for the rest, two at a time."""
    if p.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{.reg .b32 zero; mov.b32 zero, 0; max.bf16x2 $0, $1, zero;}", "=r,r", [p], dtype=gl.bfloat16,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "{.reg .b32 zero; mov.b32 zero, 0; max.f16x2 $0, $1, zero;}", "=r,r", [p], dtype=gl.float16,
            is_pure=True, pack=2,
        )  # fmt: skip


@gluon.jit
def _step(
    dk, dv, sums, n, m, pipes, keys, mask, scoring, dbias, WG: gl.constexpr, MASKED: gl.constexpr, NARROW: gl.constexpr
):
    """Step n, the query rows from m."""
    LAYOUT: gl.constexpr = accumulator(pipes.BLOCK_M)
    turn, wg = pipes.hidden(n, keys.turn, WG)
    k = pipes.key_tile(turn, wg)
    bias = load_bias(m, keys, scoring)
    q = pipes.queries.wait(n)
    running = row_products(k, q, pipes.DIM)
    bits = kept_bits(m, keys, scoring)
    s = warpgroup_mma_wait(0, deps=(running,))
    bias = pipes.load_bias(n, bias, WG)
    x, capped = exponents(s, pipes.of_rows(n, 0, LAYOUT), bias, m, keys, mask, scoring, MASKED)
    p = gl.exp2(x)
    if scoring.DROPOUT:
        p = gl.where(kept(bits, keys), p, -p)
    p = p.to(k.dtype)
    do = pipes.douts.wait(n)
    if pipes.ROTATES:
        pipes.values.await_full(pipes.of_values(turn))
    running = row_products(pipes.value_tile(turn, wg), do, pipes.DIM_V)
    if scoring.DROPOUT:
        # dV comes later: its operand, what is kept of P, would take registers beside P.
        delta = pipes.of_rows(n, 1, LAYOUT)
        dp = warpgroup_mma_wait(0, deps=(running,))
        ds = score_gradients(p, dp, delta, scoring, NARROW)
        dv_running = warpgroup_mma(gl.convert_layout(positive(p), left_operand(pipes.DV)), do, dv, is_async=True)
    else:
        dv_running = warpgroup_mma(gl.convert_layout(p, left_operand(pipes.DV)), do, dv, is_async=True)
        if not PTXAS_13:  # which serialises all products where delta is read before dP is there
            delta = pipes.of_rows(n, 1, LAYOUT)
        dp = warpgroup_mma_wait(1, deps=(running,))
        if PTXAS_13:
            delta = pipes.of_rows(n, 1, LAYOUT)
        ds = score_gradients(p, dp, delta, scoring, NARROW)
    if dbias.KIND == "column":
        sums += partial_sums(ds.to(gl.float32))
    elif dbias.KIND == "tile" or dbias.KIND == "summed":
        dbias.take(ds, m, keys, scoring)
    if scoring.SOFTCAP != "none":
        ds = _multiply(ds, (1.0 - capped * capped).to(k.dtype))
    pipes.scores.await_empty(n)
    pipes.scores_of(n, WG).store(ds)
    fence_async_shared()
    dk_running = warpgroup_mma(gl.convert_layout(ds, left_operand(pipes.D)), q, dk, is_async=True)
    pipes.scores.announce(n)
    dv, dk = warpgroup_mma_wait(0, deps=(dv_running, dk_running))
    pipes.queries.release(n)
    return dk, dv, sums


@gluon.jit
def walk(dk, dv, n, span, first, last, pipes, keys, mask, scoring, dbias, WG: gl.constexpr, NARROW: gl.constexpr):
    """The query tiles of one head added to dK and dV: a masked start, an unmasked middle, a masked end.

    span: what this consumer's keys are seen by; first, last: what the whole program walks through.
    """
    start, full, partial, stop = span
    sums = dbias.no_sums(pipes.BLOCK_M)
    if WG > 0:
        n = pipes.skip(n, start - first)
    if mask.KIND != "none" or mask.RAGGED:
        for i in range(start, full):
            dk, dv, sums = _step(dk, dv, sums, n, keys.row(i), pipes, keys, mask, scoring, dbias, WG, True, NARROW)
            n += 1
    for i in range(gl.maximum(full, start), partial):
        dk, dv, sums = _step(dk, dv, sums, n, keys.row(i), pipes, keys, mask, scoring, dbias, WG, False, NARROW)
        n += 1
    if mask.ENDS:
        for i in range(gl.maximum(partial, start), stop):
            dk, dv, sums = _step(dk, dv, sums, n, keys.row(i), pipes, keys, mask, scoring, dbias, WG, True, NARROW)
            n += 1
        if WG < pipes.GROUPS - 1:
            n = pipes.skip(n, last - stop)
    if dbias.KIND == "column":
        dbias.store_sums(sums, keys, scoring)
    return dk, dv, n
