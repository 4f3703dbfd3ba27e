"""What the roles of the backward kernel share: where the work lies, how scores are made, what flows between them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.dialect import aggregate, reinterpret
from flashtile.backends.hopper.rings import Ring
from flashtile.backends.hopper.tiles import accumulator
from flashtile.gpu.intervals import key_interval, split
from flashtile.gpu.sequences import scratch_row, sequence

KEYS = gl.constexpr(64)  # of a consumer


@aggregate
class Place:
    """One tile of keys: its sequence, its key-value head and the query heads that share it."""

    tile: gl.tensor
    b: gl.tensor
    kv_h: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    first_key: gl.tensor
    q_start: gl.tensor
    q_len: gl.tensor
    k_start: gl.tensor
    k_len: gl.tensor
    scratch: gl.tensor
    padded: gl.tensor
    VARLEN: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr

    @gluon.jit
    def head(self, g):
        """The g-th query head of the group."""
        return self.kv_h * self.group + g

    @gluon.jit
    def block(self, g):
        """The first block of BLOCK_M rows of the g-th query head in the scratch."""
        return (self.scratch + g * self.padded) // self.BLOCK_M


@gluon.jit
def place_of(
    tile, bh, cu_q, cu_k, mailbox, heads, group, max_q, max_k, total_q, total_k, padded, VARLEN: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The Place of tile number `tile` of key-value head bh, counted over the batch."""
    kv_heads = heads // group
    b = bh // kv_heads
    kv_h = bh % kv_heads
    q_start, q_len = sequence(cu_q, b, max_q, total_q, 0, mailbox, VARLEN, False)
    k_start, k_len = sequence(cu_k, b, max_k, total_k, 2, mailbox, VARLEN, False)
    scratch = scratch_row(b, kv_h * group, heads, q_start, padded, VARLEN)
    return Place(
        tile, b, kv_h, heads, group, tile * BLOCK_N, q_start, q_len, k_start, k_len, scratch, padded, VARLEN, BLOCK_M,
        BLOCK_N,
    )  # fmt: skip


@aggregate
class Mask:
    """Which query rows see which keys."""

    first_rows: gl.tensor
    end_rows: gl.tensor
    left: gl.tensor
    right: gl.tensor
    KIND: gl.constexpr
    LEFT: gl.constexpr
    RAGGED: gl.constexpr

    @gluon.jit
    def seeing(self, key, place):
        """[first, end) of the rows that see a key; those past the end stand for the last."""
        key = gl.minimum(key, place.k_len - 1)
        return key_interval(
            key, place.q_len, place.k_len, self.left, self.right, self.first_rows, self.end_rows, self.KIND
        )

    @gluon.jit
    def furthest_tile(self, tile, i, place):
        """The last tile of keys, not before `tile`, that walks through query tile i."""
        following = (tile + 1) * place.BLOCK_N
        begin, _ = self.seeing(following, place)
        while (following < place.k_len) & (begin // place.BLOCK_M <= i):
            following += place.BLOCK_N
            begin, _ = self.seeing(following, place)
        return following // place.BLOCK_N - 1

    @gluon.jit
    def walk(self, first_key, place):
        """(start, full, partial, stop) in query tiles of a consumer's keys from first_key: the tiles in [start, stop)
        see some of them, those in [full, partial) all. Keys past the end are masked everywhere.
        """
        BLOCK_M: gl.constexpr = place.BLOCK_M
        last_key = first_key + KEYS - 1
        begin_first, end_first = self.seeing(first_key, place)
        begin_last, end_last = self.seeing(last_key, place)
        start, full, partial, stop = split(begin_first, end_first, begin_last, end_last, BLOCK_M)
        stop = gl.cdiv(stop, BLOCK_M)
        full = gl.minimum(full // BLOCK_M, stop)
        # Rows past the end have weight 0, so without a left bound no masked end is needed.
        partial = gl.minimum(partial // BLOCK_M, stop) if self.LEFT else stop
        if self.RAGGED:
            whole = last_key < place.k_len
            full = gl.where(whole, full, stop)
            partial = gl.where(whole, partial, stop)
        return start // BLOCK_M, full, gl.maximum(partial, full), stop

    @gluon.jit
    def next_walk(self, first_key, first_stop, last_stop, place):
        """The walk of a consumer after the first, whose walk ends at first_stop; the one before ends at last_stop.

        Walks start and end one after the other and leave no gap: a consumer starts before the first one ends. One
        without keys walks through what is left, masked.
        """
        start, full, partial, stop = self.walk(first_key, place)
        exists = first_key < place.k_len
        start = gl.where(exists, gl.minimum(start, first_stop), first_stop)
        stop = gl.where(exists, gl.maximum(stop, last_stop), last_stop)
        return start, gl.where(exists, full, stop), gl.where(exists, partial, stop), stop

    @gluon.jit
    def walks(self, place, GROUPS: gl.constexpr):
        """The walks of all consumers."""
        first = self.walk(place.first_key, place)
        if GROUPS == 1:
            return (first,)
        else:
            second = self.next_walk(place.first_key + KEYS, first[3], first[3], place)
            if GROUPS == 2:
                return first, second
            else:
                return first, second, self.next_walk(place.first_key + 2 * KEYS, first[3], second[3], place)


@aggregate
class Scoring:
    """How a product becomes a score, and what dropout does to its weight. ORDERED: no row sees a key after its own."""

    bias: gl.tensor
    slopes: gl.tensor
    rng: gl.tensor
    stride_bb: gl.tensor
    stride_bh: gl.tensor
    stride_bm: gl.tensor
    stride_sb: gl.tensor
    scale: gl.tensor
    softcap: gl.tensor
    threshold: gl.tensor
    keep_scale: gl.tensor
    SOFTCAP: gl.constexpr
    ALIBI: gl.constexpr
    BIAS: gl.constexpr
    BIAS_ALIGN: gl.constexpr
    BIAS_STEP: gl.constexpr
    BIAS_TILES: gl.constexpr
    DROPOUT: gl.constexpr
    ORDERED: gl.constexpr

    @gluon.jit
    def slope(self, b, h):
        """The ALiBi slope of a query head."""
        slope = 0.0
        if self.ALIBI:
            slope = gl.load(self.slopes + b * self.stride_sb + h).to(gl.float32)
        return slope

    @gluon.jit
    def bias_of(self, b, h):
        """Where the bias of a query head lies."""
        at = b.to(gl.int64) * self.stride_bb + h.to(gl.int64) * self.stride_bh
        return self.bias + at * self.BIAS_ALIGN


@aggregate
class Pipes:
    """What flows between the roles: K and V, a ring of query tiles with their rows of lse and delta, one of dO tiles
    released together with it, a ring of dS, and the shared memory through which dQ leaves.

    DIM, DIM_V: how many of a tile's D or DV columns the head dims take.
    biases: for each slot of the query ring and each consumer, the bias of its scores, a row of 64 keys for each query.
    """

    keys: gl.shared_memory_descriptor
    values: gl.shared_memory_descriptor
    loaded: gl.shared_memory_descriptor
    done: gl.shared_memory_descriptor
    queries: Ring
    rows: gl.shared_memory_descriptor
    douts: Ring
    biases: gl.shared_memory_descriptor
    scores: Ring
    exits: gl.shared_memory_descriptor
    GROUPS: gl.constexpr
    BLOCK_M: gl.constexpr
    D: gl.constexpr
    DV: gl.constexpr
    DIM: gl.constexpr
    DIM_V: gl.constexpr
    SLOTS: gl.constexpr
    GROUPED: gl.constexpr
    BIAS_TILES: gl.constexpr

    @gluon.jit
    def of_rows(self, n, WHICH: gl.constexpr, layout: gl.constexpr):
        """[1, BLOCK_M]: lse (0) or delta (1) of the query rows of step n."""
        pair = self.rows.index(n % self.queries.STAGES)
        return reinterpret(pair, gl.float32, [2, 1, self.BLOCK_M], pair.layout).index(WHICH).load(layout)

    @gluon.jit
    def bias(self, n, w):
        """The bias of the scores of step n that consumer w makes, [BLOCK_M, 64]."""
        return self.biases.index(n % self.queries.STAGES * self.GROUPS + w)

    @gluon.jit
    def load_bias(self, n, early, WG: gl.constexpr):
        """The same transposed in registers, once the queries are there; `early` where it does not come by TMA."""
        if self.BIAS_TILES:
            return self.bias(n, WG).permute((1, 0)).load(accumulator(self.BLOCK_M))
        else:
            return early

    @gluon.jit
    def scores_of(self, n, w):
        """The part of dS^T of step n that consumer w makes, [64, BLOCK_M]. In memory it is dS: a bias's gradient leaves
        from there.
        """
        return self.scores.buffers.index(n % self.scores.STAGES * self.GROUPS + w).permute((1, 0))

    @gluon.jit
    def exit(self, n, part):
        """Where part `part` of dQ of step n leaves, one for each [64, min(D, 64)] of it."""
        C: gl.constexpr = min(self.D, 64)
        PARTS: gl.constexpr = self.BLOCK_M // 64 * ((self.DIM + C - 1) // C)
        return self.exits.index((n * PARTS + part) % self.SLOTS)

    @gluon.jit
    def skip(self, n, count):
        """A consumer's: `count` steps whose rows see none of its keys. Returns the step after them."""
        for _ in range(count):
            self.queries.await_full(n)
            self.scores.await_empty(n)
            self.scores.announce(n)
            self.queries.release(n)
            n += 1
        return n
