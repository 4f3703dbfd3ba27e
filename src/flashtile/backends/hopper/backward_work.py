"""What the roles of the backward kernel share: which rows see which keys, how scores are made, what flows there."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashtile.backends.hopper.descriptors import swizzled
from flashtile.backends.hopper.dialect import aggregate, reinterpret
from flashtile.backends.hopper.rings import Ring
from flashtile.backends.hopper.tiles import accumulator
from flashtile.gpu.intervals import key_interval, split

KEYS = gl.constexpr(64)  # of a consumer


@aggregate
class Mask:
    """Which query rows see which keys. ENDS: walks may end with masked tiles, as under a left bound or mirrored."""

    first_rows: gl.tensor
    end_rows: gl.tensor
    stride_tb: gl.tensor
    left: gl.tensor
    right: gl.tensor
    KIND: gl.constexpr
    LEFT: gl.constexpr
    ENDS: gl.constexpr
    RAGGED: gl.constexpr

    @gluon.jit
    def seeing(self, key, place):
        """[first, end) of the rows that see a key; those past the end stand for the last."""
        key = gl.minimum(key, place.k_len - 1)
        table = place.b.to(gl.int64) * self.stride_tb
        return key_interval(
            key, place.q_len, place.k_len, self.left, self.right, self.first_rows + table, self.end_rows + table,
            self.KIND,
        )  # fmt: skip

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
            return (place.mirror(first, first),)
        else:
            second = self.next_walk(place.first_key + KEYS, first[3], first[3], place)
            if GROUPS == 2:
                return place.mirror(first, second), place.mirror(second, first)
            else:
                return first, second, self.next_walk(place.first_key + 2 * KEYS, first[3], second[3], place)


@gluon.jit
def whole(spans):
    """[first, last) of the query tiles that the walks of an item's consumers go through."""
    return spans[0][0], spans[len(spans) - 1][3]


@gluon.jit
def steps_of(place, spans):
    """How many steps an item has, over all its query heads."""
    first, last = whole(spans)
    return (last - first) * place.together


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
    """What flows between the roles: K and V of a program's item, a ring of query tiles with their rows of lse and
    delta, one of dO tiles released together with it, a ring of dS, and the shared memory through which dQ leaves.

    Steps count as n over all items, items as turns. keys, values: rings of one slot, a tile for each consumer in it; or
    one ring of three (ROTATES), through which keys and values come in turns, so that the next keys find room early.
    scores: the buffer of a consumer holds its slots one after the other, so that dK finds room there in the end.
    DIM, DIM_V: how many of a tile's D or DV columns the head dims take. PANELS: tiles of so many columns of 64 lie one
    after the other that keys and queries take. MAKES: what a launch makes, see backward_configs.launches.
    biases: for each slot of the query ring and each consumer, the bias of its scores, a row of 64 keys for each query.
    """

    keys: Ring
    values: Ring
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
    ROTATES: gl.constexpr
    PANELS: gl.constexpr
    MAKES: gl.constexpr

    @gluon.jit
    def of_keys(self, turn):
        """The number of an item's keys in their ring."""
        return 2 * turn if self.ROTATES else turn

    @gluon.jit
    def of_values(self, turn):
        """The number of an item's values in theirs."""
        return 2 * turn + 1 if self.ROTATES else turn

    @gluon.jit
    def key_tile(self, turn, w):
        """The 64 keys of consumer w."""
        return self.keys.buffers.index(self.of_keys(turn) % self.keys.STAGES * self.GROUPS + w)

    @gluon.jit
    def key_panel(self, turn, w, i: gl.constexpr):
        """Panel i of them."""
        return self.keys.buffers.index((self.of_keys(turn) % self.keys.STAGES * self.GROUPS + w) * self.PANELS + i)

    @gluon.jit
    def query_panel(self, n, i: gl.constexpr):
        """Panel i of the query rows of step n."""
        return self.queries.buffers.index(n % self.queries.STAGES * self.PANELS + i)

    @gluon.jit
    def value_tile(self, turn, w):
        """Their values."""
        return self.values.buffers.index(self.of_values(turn) % self.values.STAGES * self.GROUPS + w)

    @gluon.jit
    def nil(self, n):
        """A 0 that the compiler does not know. What depends on it is worked out in each step: the descriptors of wide
        tiles would take more uniform registers than there are, and be moved to and fro between the products. Beside
        tiles of a bias and all other features that makes Triton 3.7 serialise the products (C7512).
        """
        return n >> 31 if self.D > 64 and not self.BIAS_TILES else 0

    @gluon.jit
    def hidden(self, n, turn, WG: gl.constexpr):
        """What a consumer's tiles of keys and values are found by, such that no compiler knows them before step n."""
        if self.ROTATES:
            return turn + self.nil(n), WG
        else:
            return turn, WG + self.nil(n)

    @gluon.jit
    def await_done(self, turn):
        """Waits until dQ has been made from all of an item's dS, and reads its keys no more.

        Two barriers take turns, for an item without steps may be done with before its consumers ask about the last one.
        """
        mbarrier.wait(self.done.index(turn % 2), (turn // 2) & 1)

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
        slots = self.scores.buffers.index(w)
        tiles = reinterpret(slots, slots.dtype, [self.scores.STAGES, self.BLOCK_M, KEYS], swizzled(2, KEYS))
        return tiles.index(n % self.scores.STAGES).permute((1, 0))

    @gluon.jit
    def way_out(self, dtype: gl.constexpr, WG: gl.constexpr):
        """[64, D] in a consumer's own slots of dS, for its dK once dQ has been made from all dS."""
        return reinterpret(self.scores.buffers.index(WG), dtype, [KEYS, self.D], swizzled(2, self.D))

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
            if self.MAKES != "values":
                self.scores.await_empty(n)
                self.scores.announce(n)
            self.queries.release(n)
            n += 1
        return n
