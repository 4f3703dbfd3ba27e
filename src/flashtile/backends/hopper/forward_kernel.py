"""Forward on Hopper: a producer warp group feeds K and V by TMA, consumer warp groups of 64 query rows multiply.

One step of a consumer, for key tile j (docs/kernels/hopper_forward.md has the drawing):

    issue S_j = Q K_j^T;  issue O += P_(j-1) V_(j-1);  wait for S_j and make P_j of it while the second product runs

or, where P_j takes the place of S_j, while the products of other consumers run.

Programs are persistent: each walks through (query tile, head) items. The producer says which item is next, and what it
loads for that one arrives while the consumers finish this one. Key tiles are visited from the last to the first: a
causal diagonal comes first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtile.backends.hopper.descriptors import await_writes, store_rows, swizzled
from flashtile.backends.hopper.dialect import aggregate, barrier
from flashtile.backends.hopper.forward_load import producer
from flashtile.backends.hopper.lengths import Lengths
from flashtile.backends.hopper.online_softmax import shrink, weigh, weigh_first, weigh_in_place
from flashtile.backends.hopper.rings import Ring, barriers, first_slot, ring
from flashtile.backends.hopper.scores import MINUS_INFINITY, drop, load_bias, scores
from flashtile.backends.hopper.tiles import accumulator, add_row_products, left_operand
from flashtile.backends.hopper.work import Change, Places, Rows, Shapes, places
from flashtile.gpu.arguments import RUNTIME
from flashtile.gpu.philox import random_state
from flashtile.gpu.scores import LN2
from flashtile.gpu.sequences import past_end


@aggregate
class Pipes:
    """What flows between the roles: rings of query, key and value tiles, where the queries lie, and the way out.

    biases: for each slot of the key ring and each consumer, the bias of its scores, which comes and goes with the keys.
    TOGETHER: both rings have the same barriers. Key tile n and the values of the tile before it arrive in slot n, and
    are released, as one; an item's last values have a slot of their own.
    """

    queries: Ring
    places: Places
    keys: Ring
    values: Ring
    biases: gl.shared_memory_descriptor
    outputs: gl.shared_memory_descriptor
    GROUPS: gl.constexpr
    BLOCK_N: gl.constexpr
    DIM: gl.constexpr
    DV: gl.constexpr
    SHARED: gl.constexpr
    PIECES: gl.constexpr
    STRIPS: gl.constexpr
    BIAS_TILES: gl.constexpr
    PANELS: gl.constexpr
    TOGETHER: gl.constexpr

    @gluon.jit
    def query(self, work, WG: gl.constexpr, i: gl.constexpr):
        """Panel i of the 64 query rows number WG of item `work`."""
        return self.queries.buffers.index((work % self.queries.STAGES * self.GROUPS + WG) * self.PANELS + i)

    @gluon.jit
    def key(self, n, i: gl.constexpr):
        """Panel i of key tile n."""
        return self.keys.buffers.index(self.keys.place(n) * self.PANELS + i)

    @gluon.jit
    def bias(self, n, WG: gl.constexpr):
        """The bias of consumer WG's scores of key tile n."""
        return self.biases.index(self.keys.place(n) * self.GROUPS + WG)

    @gluon.jit
    def load_bias(self, n, early, WG: gl.constexpr):
        """The same in registers, once the keys are there; `early` where it does not come by TMA."""
        if self.BIAS_TILES:
            return self.bias(n, WG).load(accumulator(self.BLOCK_N))
        else:
            return early

    @gluon.jit
    def place(self, work):
        """(tile, sequence, head, search) of item `work`, once its queries are there; a tile below 0: there is none."""
        self.queries.await_full(work)
        return self.places.read(work)

    @gluon.jit
    def skip(self, n, count):
        """Lets `count` slots pass that only other consumers' rows see; the number of the slot after."""
        for _ in range(count):
            self.keys.await_full(n)
            self.keys.release(n)
            if not self.TOGETHER:
                self.values.await_full(n)
                self.values.release(n)
            n += 1
        return n

    @gluon.jit
    def issue_scores(self, work, n, WG: gl.constexpr):
        """Q K^T of key tile n, which is full, and of consumer WG's rows of item `work`; running."""
        WIDTH: gl.constexpr = self.keys.buffers.shape[2]
        s = gl.zeros([64, self.BLOCK_N], gl.float32, accumulator(self.BLOCK_N))
        for i in gl.static_range(self.PANELS):
            s = add_row_products(s, self.query(work, WG, i), self.key(n, i), min(WIDTH, self.DIM - WIDTH * i), i > 0)
        return s

    @gluon.jit
    def issue_output(self, p16, n, o):
        """O + P V of the values in slot n, which is full; running."""
        return warpgroup_mma(p16, self.values.slot(n), o, is_async=True)

    @gluon.jit
    def operand(self, p, DTYPE: gl.constexpr):
        """P as the left operand of the second product."""
        return gl.convert_layout(p.to(DTYPE), left_operand(self.DV))


@gluon.jit
def _masked(tile, span, change):
    """Whether rows may not see all keys of a tile."""
    _, full, partial, _ = span
    masked = tile >= partial
    if change.LEFT:
        masked = masked | (tile < full)
    return masked


@gluon.jit
def _walk(o, l, m, p16, work, n, span, pipes, rows, change, MASKED: gl.constexpr):
    """The key tiles after an item's first: the products of tile n - 1 with V run under the exponentials of tile n.

    p16: the weights of tile n - 1, not yet multiplied, as the walk leaves those of its last tile.
    MASKED: some of the tiles are; one loop goes over all, since 16-bit values that cross from loop to loop are
    unpacked and packed again.
    """
    for tile in range(span[3] - 2, span[0] - 1, -1):
        key = tile * pipes.BLOCK_N
        bias = load_bias(rows, change, key, pipes.BLOCK_N)
        pipes.keys.await_full(n)
        s = pipes.issue_scores(work, n, rows.WG)
        running = pipes.issue_output(p16, n - 1, o)
        bias = pipes.load_bias(n, bias, rows.WG)
        s = warpgroup_mma_wait(1, deps=(s,))
        pipes.keys.release(n)
        s, unit = scores(s, rows, change, key, bias, _masked(tile, span, change), MASKED)
        p, m, l, alpha = weigh(s, unit, m, l, pipes.PIECES)
        if change.DROPOUT:
            p = drop(p, rows, change, key)
        # ptxas moves this wait up to the last branch before it. That is in weigh, below the exponentials.
        o = warpgroup_mma_wait(0, deps=(running,))
        pipes.values.release(n - 1)
        pipes.values.await_full(n)
        p16 = pipes.operand(p, p16.dtype)
        o = shrink(o, alpha)
        n += 1
    return o, l, m, p16, n


@gluon.jit
def _walk_in_place(o, l, m, p16, work, n, span, search, pipes, rows, change, MASKED: gl.constexpr):
    """The same where weights take the scores' registers: both products end before the exponentials, under which those
    of other consumers run, and their tiles come and go together.
    """
    for tile in range(span[3] - 2, span[0] - 1, -1):
        key = tile * pipes.BLOCK_N
        pipes.keys.await_full(n)
        s = pipes.issue_scores(work, n, rows.WG)
        running = pipes.issue_output(p16, n, o)
        s = warpgroup_mma_wait(1, deps=(s,))
        s, unit = scores(s, rows, change, key, 0.0, _masked(tile, span, change), MASKED)
        o = warpgroup_mma_wait(0, deps=(running,))
        pipes.keys.release(n)
        p, o, m, l = weigh_in_place(s, o, unit, m, l, search, p16.dtype)
        p16 = pipes.operand(p, p16.dtype)
        n += 1
    return o, l, m, p16, n


@gluon.jit
def _attend(work, n, span, search, pipes, rows, change, m, KIND: gl.constexpr):
    """(O, l, m and the weights of the last key tile, not yet multiplied; n) of one query tile; O is not yet divided."""
    key = (span[3] - 1) * pipes.BLOCK_N
    bias = load_bias(rows, change, key, pipes.BLOCK_N)
    pipes.keys.await_full(n)
    s = pipes.issue_scores(work, n, rows.WG)
    bias = pipes.load_bias(n, bias, rows.WG)
    s = warpgroup_mma_wait(0, deps=(s,))
    pipes.keys.release(n)
    s, unit = scores(s, rows, change, key, bias, True, change.RAGGED)
    p, m, l = weigh_first(s, unit, m)
    if change.DROPOUT:
        p = drop(p, rows, change, key)
    p16 = pipes.operand(p, pipes.keys.buffers.dtype)
    o = gl.zeros([64, pipes.DV], gl.float32, accumulator(pipes.DV))
    MASKED: gl.constexpr = KIND != "none" and (change.LEFT or not change.SINGLE)
    if pipes.TOGETHER:
        return _walk_in_place(o, l, m, p16, work, n + 1, span, search, pipes, rows, change, MASKED)
    else:
        pipes.values.await_full(n)
        return _walk(o, l, m, p16, work, n + 1, span, pipes, rows, change, MASKED)


@gluon.jit
def _item(
    o_desc, lse, work, n, b, h, search, first_row, span, q_len, pipes, shapes, change, state, WG: gl.constexpr
):  # fmt: skip
    """The 64 rows number WG of one item, from S to the stores of O and lse; the number of the key tile after it."""
    S_ROWS: gl.constexpr = gl.SliceLayout(1, accumulator(shapes.BLOCK_N))
    q_start, _, _, k_len = shapes.lengths.of(b, False)
    mine = first_row + 64 * WG
    before = 0
    if shapes.KIND != "none" and pipes.STRIPS:
        whole = span
        span = shapes.own_walk(whole, mine, b, q_len, k_len)
        n = pipes.skip(n, whole[3] - span[3])
        if change.LEFT:
            before = span[0] - whole[0]
    row = mine + gl.arange(0, 64, layout=S_ROWS)
    begin, end = shapes.seen(gl.minimum(row, q_len - 1), b, q_len, k_len)
    slope, sink = change.of_head(b, h)
    bias = change.bias_of(b, h, mine)
    low, high, offset = state
    rows = Rows(mine, row, begin, end, q_len, k_len, b * shapes.heads + h, bias, slope, low, high, offset, WG)
    m = gl.full([64], 0.0, gl.float32, S_ROWS) + sink
    o, l, m, p16, n = _attend(work, n, span, search, pipes, rows, change, m, shapes.KIND)
    m = gl.convert_layout(gl.max(m, 1), S_ROWS)
    total = gl.convert_layout(gl.sum(l, 1), S_ROWS)
    if pipes.PIECES == 0:
        pipes.places.leave(work, total, WG)
    if not pipes.SHARED:
        pipes.queries.release(work)
    if pipes.TOGETHER:
        pipes.values.await_full(n)
        n += 1
    running = pipes.issue_output(p16, n - 1, o)
    if change.SINKS:
        total += gl.exp2(sink - m)
    some = gl.where(total == 0.0, 1.0, total)
    share = gl.convert_layout(change.keep_scale / some, gl.SliceLayout(1, accumulator(pipes.DV)))
    log_sum = gl.where(total == 0.0, MINUS_INFINITY, (m + gl.log2(total)) * LN2)
    at = shapes.lse_row(b, h, q_start)
    gl.store(lse + at + row, log_sum, mask=row < q_len)
    tma.store_wait(0)
    o = warpgroup_mma_wait(0, deps=(running,))
    pipes.values.release(n - 1)
    if change.LEFT and pipes.STRIPS:
        n = pipes.skip(n, before)
    if pipes.PIECES == 0:
        if search != 0:
            await_writes(b)  # of the same rows, done before without a search
    _leave(o_desc, (o * share[:, None]).to(p16.dtype), work, b, h, q_start, q_len, mine, pipes, shapes, WG)
    if pipes.SHARED:
        tma.store_wait(0)
        pipes.queries.release(work)
    return n


@gluon.jit
def _leave(o_desc, o, work, b, h, q_start, q_len, row, pipes, shapes, WG: gl.constexpr):
    """Starts the copy of 64 rows of O from row `row` on to their place."""
    VARLEN: gl.constexpr = shapes.lengths.VARLEN
    if pipes.PANELS > 1:  # O is two of them wide
        left, right = o.reshape([64, 2, pipes.DV // 2]).permute([0, 2, 1]).split()
        pipes.query(work, WG, 0).store(left)
        pipes.query(work, WG, 1).store(right)
        fence_async_shared()
        barrier()
        for i in gl.static_range(2):
            store_rows(o_desc, pipes.query(work, WG, i), b, h, q_start, q_len, row, VARLEN, 64 * i)
    else:
        own = pipes.query(work, WG, 0) if pipes.SHARED else pipes.outputs.index(WG)
        own.store(o)
        fence_async_shared()
        barrier()
        store_rows(o_desc, own, b, h, q_start, q_len, row, VARLEN)


@gluon.jit
def _consumer(o_desc, out, lse, stride_om, stride_oh, pipes, shapes, change, WG: gl.constexpr, DIM_V: gl.constexpr):
    """The 64 rows number WG of each item's query tile; none where they lie behind the sequence's end."""
    state = random_state(change.rng, change.DROPOUT)
    n = first_slot()
    work = 0
    tile, b, h, search = pipes.place(work)
    while tile >= 0:
        _, q_len, _, k_len = shapes.lengths.of(b, False)
        first_row = tile * shapes.BLOCK_M
        span = shapes.walk(first_row, b, q_len, k_len, shapes.BLOCK_M)
        # Settled when the kernel is compiled. Where shared memory is short, registers are, too: no branch fits.
        if WG == 0 or pipes.SHARED:  # noqa: SIM114
            n = _item(o_desc, lse, work, n, b, h, search, first_row, span, q_len, pipes, shapes, change, state, WG)
        elif first_row + 64 * WG < q_len:
            n = _item(o_desc, lse, work, n, b, h, search, first_row, span, q_len, pipes, shapes, change, state, WG)
        else:
            n = pipes.skip(n, span[3] - span[0] + (1 if pipes.TOGETHER else 0))
            if pipes.PIECES == 0:
                pipes.places.leave(work, gl.zeros([64], gl.float32, gl.SliceLayout(1, accumulator(64))), WG)
            pipes.queries.release(work)
        work += 1
        tile, b, h, search = pipes.place(work)
    tma.store_wait(0)
    if shapes.lengths.VARLEN and WG == 0:
        for b in range(-1 - tile, shapes.batch, gl.num_programs(0)):
            shapes.lengths.of(b, True)
        for i in range(-1 - tile, shapes.tiles * shapes.heads, gl.num_programs(0)):
            row = i // shapes.heads * 64
            _blank(out, lse, row, i % shapes.heads, stride_om, stride_oh, shapes, pipes.DV, DIM_V)


@gluon.jit
def _blank(out, lse, offset, h, stride_om, stride_oh, shapes, DV: gl.constexpr, DIM_V: gl.constexpr):
    """Zeros, and lse of -inf, for a share of the packed rows that belong to no sequence."""
    BOTH: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows = gl.arange(0, 64, layout=gl.SliceLayout(1, BOTH))
    column = gl.arange(0, DV, layout=gl.SliceLayout(0, BOTH))
    zeros = gl.zeros([64, DV], out.dtype.element_ty, BOTH)
    hidden = gl.full([64], MINUS_INFINITY, gl.float32, gl.SliceLayout(1, BOTH))
    start = past_end(shapes.lengths.cu_q, shapes.batch, shapes.lengths.total_q)
    for first in range(start + offset, shapes.lengths.total_q, shapes.tiles * 64):
        row = first + rows
        inside = row < shapes.lengths.total_q
        at = h.to(gl.int64) * stride_oh + row.to(gl.int64)[:, None] * stride_om + column[None, :]
        gl.store(out + at, zeros, mask=inside[:, None] & (column < DIM_V)[None, :])
        gl.store(lse + shapes.lse_row(0, h, 0) + row, hidden, mask=inside)


@gluon.jit(do_not_specialize=[*RUNTIME, "stride_bb", "stride_bh", "stride_bm"])
def forward_kernel(
    q_desc, k_desc, v_desc, o_desc, bias_desc, out, lse, counter, bias, slopes, sinks, cu_q, cu_k, lo, hi, rng, mailbox,
    stride_om, stride_oh, stride_bb, stride_bh, stride_bm, stride_sb, stride_tb, batch, heads, group, max_q, max_k,
    total_q, total_k, tiles, programs, section, left, right, scale, softcap, threshold, keep_scale,
    GROUPS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, SHARED: gl.constexpr, DIM: gl.constexpr,
    DIM_V: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr, VARLEN: gl.constexpr,
    KIND: gl.constexpr, LEFT: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr, BIAS: gl.constexpr,
    BIAS_ALIGN: gl.constexpr, BIAS_STEP: gl.constexpr, BIAS_TILES: gl.constexpr, SINKS: gl.constexpr,
    DROPOUT: gl.constexpr, FOLD: gl.constexpr, RAGGED: gl.constexpr, SINGLE: gl.constexpr, PAIRED: gl.constexpr,
    COUNTED: gl.constexpr, BATCH_FIRST: gl.constexpr, QUERY_STAGES: gl.constexpr, PIECES: gl.constexpr,
    STRIPS: gl.constexpr, PANELS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    D: gl.constexpr = q_desc.block_type.shape[-1]
    DV: gl.constexpr = v_desc.block_type.shape[-1]
    lengths = Lengths(cu_q, cu_k, mailbox, max_q, max_k, total_q, total_k, VARLEN)
    shapes = Shapes(
        lengths, lo, hi, batch, heads, group, tiles, programs, section, left, right, stride_tb, KIND, PAIRED, COUNTED,
        BATCH_FIRST, GROUPS * 64, BLOCK_N,
    )  # fmt: skip
    change = Change(
        bias, slopes, sinks, rng, stride_bb, stride_bh, stride_bm, stride_sb, scale, softcap, threshold, keep_scale,
        SOFTCAP, ALIBI, BIAS, BIAS_ALIGN, BIAS_STEP, BIAS_TILES, SINKS, DROPOUT, FOLD, LEFT, RAGGED, SINGLE,
    )  # fmt: skip
    q_tiles = gl.allocate_shared_memory(dtype, [QUERY_STAGES * GROUPS * PANELS, 64, D], swizzled(2, D))
    queries = Ring(q_tiles, barriers(QUERY_STAGES, 1), barriers(QUERY_STAGES, GROUPS), QUERY_STAGES)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES * PANELS, BLOCK_N, D], swizzled(2, D))
    keys = Ring(k_tiles, barriers(STAGES, 1), barriers(STAGES, GROUPS), STAGES)
    TOGETHER: gl.constexpr = PIECES == 0
    gl.static_assert(not TOGETHER or (BIAS == "none" and not DROPOUT), "weights in place leave no registers for these")
    if TOGETHER:
        v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DV], swizzled(2, DV))
        values = Ring(v_tiles, keys.full, keys.empty, STAGES)
    else:
        values = ring(dtype, BLOCK_N, DV, swizzled(2, DV), STAGES, GROUPS)
    outputs = q_tiles
    if not SHARED:
        outputs = gl.allocate_shared_memory(dtype, [GROUPS, 64, DV], swizzled(2, DV))
    biases = q_tiles
    if BIAS_TILES:
        biases = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, 64, BLOCK_N], swizzled(2, BLOCK_N))
    pipes = Pipes(
        queries, places(QUERY_STAGES, GROUPS, dtype), keys, values, biases, outputs, GROUPS, BLOCK_N, DIM, DV, SHARED,
        PIECES, STRIPS, BIAS_TILES, PANELS, TOGETHER,
    )  # fmt: skip
    fence_async_shared()
    barrier()
    if GROUPS == 4:
        gl.warp_specialize(
            [
                (_consumer, (o_desc, out, lse, stride_om, stride_oh, pipes, shapes, change, 0, DIM_V)),
                (_consumer, (o_desc, out, lse, stride_om, stride_oh, pipes, shapes, change, 1, DIM_V)),
                (_consumer, (o_desc, out, lse, stride_om, stride_oh, pipes, shapes, change, 2, DIM_V)),
                (_consumer, (o_desc, out, lse, stride_om, stride_oh, pipes, shapes, change, 3, DIM_V)),
                (producer, (q_desc, k_desc, v_desc, bias_desc, counter, pipes, shapes, change)),
            ],
            [4, 4, 4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    elif GROUPS == 3:
        gl.warp_specialize(
            [
                (_consumer, (o_desc, out, lse, stride_om, stride_oh, pipes, shapes, change, 0, DIM_V)),
                (_consumer, (o_desc, out, lse, stride_om, stride_oh, pipes, shapes, change, 1, DIM_V)),
                (_consumer, (o_desc, out, lse, stride_om, stride_oh, pipes, shapes, change, 2, DIM_V)),
                (producer, (q_desc, k_desc, v_desc, bias_desc, counter, pipes, shapes, change)),
            ],
            [4, 4, 4],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (o_desc, out, lse, stride_om, stride_oh, pipes, shapes, change, 0, DIM_V)),
                (_consumer, (o_desc, out, lse, stride_om, stride_oh, pipes, shapes, change, 1, DIM_V)),
                (producer, (q_desc, k_desc, v_desc, bias_desc, counter, pipes, shapes, change)),
            ],
            [4, 4],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
