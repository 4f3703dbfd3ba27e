"""What the roles of the forward kernel share: where the work lies, and what a score depends on."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.dialect import aggregate, barrier
from flashtile.backends.hopper.lengths import Lengths
from flashtile.backends.hopper.online_softmax import overflowed
from flashtile.backends.hopper.words import Words, words
from flashtile.gpu.intervals import interval, split
from flashtile.gpu.scores import LOG2E
from flashtile.gpu.sequences import place


@aggregate
class Shapes:
    """Where the work lies: what every role needs to find its items, and the mask."""

    lengths: Lengths
    lo: gl.tensor
    hi: gl.tensor
    batch: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    tiles: gl.tensor
    programs: gl.tensor
    section: gl.tensor
    left: gl.tensor
    right: gl.tensor
    stride_tb: gl.tensor
    KIND: gl.constexpr
    PAIRED: gl.constexpr
    COUNTED: gl.constexpr
    BATCH_FIRST: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr

    @gluon.jit
    def place(self, turn):
        """(tile, batch, head) of this program's item on its `turn`-th turn; the last rows, which see most, come first.

        Every program gets the same sum of work where it falls evenly from a head's last tile to its first. PAIRED: a
        tile and its mirror image make one unit of work, all units are alike, and heads stay together in sections that
        fit the L2 cache. Otherwise turns run forth and back over the programs. BATCH_FIRST: what the batch shares of a
        head is read by all of it at once.
        """
        width = gl.num_programs(0)
        own = gl.program_id(0)
        if self.PAIRED:
            half = (self.tiles + 1) // 2
            tile, bh = place((turn // 2) * width + own, half, self.programs, self.section)
            tile = gl.where(turn % 2 == 0, self.tiles - 1 - tile, tile)
        else:
            whole = (turn + 1) * width <= self.tiles * self.programs
            item = turn * width + gl.where((turn % 2 == 1) & whole, width - 1 - own, own)
            tile, bh = place(item, self.tiles, self.programs, self.section)
            tile = self.tiles - 1 - tile
        return self.of_head(tile, bh)

    @gluon.jit
    def at(self, item):
        """(tile, batch, head) of an item; within a section of heads the longest come first."""
        tile, bh = place(item, self.tiles, self.programs, self.section)
        return self.of_head(self.tiles - 1 - tile, bh)

    @gluon.jit
    def of_head(self, tile, bh):
        """(tile, batch, head) of a tile of head bh, counted over the batch."""
        if self.BATCH_FIRST:
            return tile, bh % self.batch, bh // self.batch
        else:
            return tile, bh // self.heads, bh % self.heads

    @gluon.jit
    def turns(self):
        """How many items this program has."""
        per_head = (self.tiles + 1) // 2 if self.PAIRED else self.tiles
        units = (per_head * self.programs - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
        return units * 2 if self.PAIRED else units

    @gluon.jit
    def start(self):
        """(turn, tile, sequence, head, items of the sequences before it) of this program's first item; no item where
        the tile is below 0.

        COUNTED: items differ too much to be shared out beforehand, so who is free takes the next one. Packed sequences
        are such.
        """
        zero = gl.to_tensor(0)
        if self.COUNTED:
            return self.take(gl.program_id(0), zero, zero)
        else:
            return self.seek(zero)

    @gluon.jit
    def next(self, turn, b, before, counter):
        """As `start`, of the item after."""
        if self.COUNTED:
            return self.take(gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed"), b, before)
        else:
            return self.seek(turn + 1)

    @gluon.jit
    def take(self, item, b, before):
        """The item with a number among those of all programs."""
        if self.lengths.VARLEN:
            return self.find(item, b, before)
        else:
            tile, b, h = self.at(gl.minimum(item, self.tiles * self.programs - 1))
            tile = gl.where(item < self.tiles * self.programs, tile, -1)
            return gl.to_tensor(0), tile, b, h, before

    @gluon.jit
    def seek(self, turn):
        """The first item from a turn on; a tile of -1 past the last."""
        tile, b, h = self.place(turn)
        if self.PAIRED:
            # The middle tile's mirror image is itself.
            twice = (turn % 2 == 1) & (2 * tile + 1 == self.tiles)
            turn += twice.to(gl.int32)
            tile, b, h = self.place(turn)
        tile = gl.where((turn < self.turns()) & (tile * self.BLOCK_M < self.lengths.max_q), tile, -1)
        return turn, tile, b, h, gl.to_tensor(0)

    @gluon.jit
    def find(self, item, b, before):
        """From sequence b on, which has `before` items before it. After the last, tiles are -1, -2 and so on, each for
        one program.
        """
        more = b < self.batch
        count = gl.to_tensor(0)
        while more:
            count = self.tiles_of(b)
            after = before + count * self.heads
            more = item >= after
            if more:
                before = after
                b += 1
                more = b < self.batch
        tile = before - item - 1
        h = gl.to_tensor(0)
        if b < self.batch:
            tile, h = place(item - before, count, self.heads, gl.minimum(self.section, self.heads))
            tile = count - 1 - tile
        return gl.to_tensor(0), tile, b, h, before

    @gluon.jit
    def tiles_of(self, b):
        """Query tiles of packed sequence b."""
        _, length = self.lengths.of_queries(b, False)
        return gl.cdiv(length, self.BLOCK_M)

    @gluon.jit
    def lse_row(self, b, h, start):
        """Where the lse of a sequence's first row lies."""
        if self.lengths.VARLEN:
            return h.to(gl.int64) * self.lengths.total_q + start
        else:
            return (b * self.heads + h).to(gl.int64) * self.lengths.max_q

    @gluon.jit
    def seen(self, row, b, q_len, k_len):
        """[begin, end) of the keys that rows see."""
        at = b.to(gl.int64) * self.stride_tb
        return interval(row, q_len, k_len, self.left, self.right, self.lo + at, self.hi + at, self.KIND)

    @gluon.jit
    def walk(self, first_row, b, q_len, k_len, ROWS: gl.constexpr):
        """The key tiles of ROWS rows as (first, full, partial, stop): all in [first, stop), unmasked in
        [full, partial). There is always one, even where no row sees anything: its keys are all hidden.
        """
        last_row = gl.minimum(first_row + ROWS, q_len) - 1
        first_row = gl.minimum(first_row, last_row)
        begin_first, end_first = self.seen(first_row, b, q_len, k_len)
        begin_last, end_last = self.seen(last_row, b, q_len, k_len)
        start, full, partial, stop = split(begin_first, end_first, begin_last, end_last, self.BLOCK_N)
        first = start // self.BLOCK_N
        stop = gl.maximum(gl.cdiv(stop, self.BLOCK_N), first + 1)
        return first, full // self.BLOCK_N, partial // self.BLOCK_N, stop

    @gluon.jit
    def own_walk(self, whole, first_row, b, q_len, k_len):
        """The walk of one consumer's 64 rows within the `whole` one of its query tile, of which they see a part."""
        first, _, _, stop = whole
        own_first, full, partial, own_stop = self.walk(first_row, b, q_len, k_len, 64)
        own_first = gl.minimum(gl.maximum(own_first, first), stop - 1)
        own_stop = gl.minimum(gl.maximum(own_stop, own_first + 1), stop)
        return own_first, full, partial, own_stop


@aggregate
class Places:
    """Where the query tiles of a ring lie, in shared memory beside them: tile (below 0: no more), sequence and head,
    whether each maximum is to be searched for; and the rows' sums of weights, which tell whether it must be.
    """

    words: Words
    totals: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    GROUPS: gl.constexpr
    DTYPE: gl.constexpr

    @gluon.jit
    def write(self, work, tile, b, h, search):
        """The producer's, before it announces the slot's bytes."""
        at = work % self.STAGES * 4
        self.words.write(at, tile, 4)
        self.words.write(at + 1, b, 4)
        self.words.write(at + 2, h, 4)
        self.words.write(at + 3, search, 4)
        barrier()

    @gluon.jit
    def read(self, work):
        """(tile, sequence, head, search) of the slot's item. Consumers' once it is full, the producer's once empty."""
        at = work % self.STAGES * 4
        return self.words.read(at), self.words.read(at + 1), self.words.read(at + 2), self.words.read(at + 3)

    @gluon.jit
    def leave(self, work, total, WG: gl.constexpr):
        """A consumer's, before it releases the slot: the sums [64] of its rows."""
        self.totals.index(work % self.STAGES * self.GROUPS + WG).store(total)

    @gluon.jit
    def failed(self, work):
        """The producer's, once the slot is empty: not 0 where its last item must be done again. It says so once."""
        WARP: gl.constexpr = gl.BlockedLayout([2], [32], [4], [0])
        at = work % self.STAGES * 4 + 3
        bad = gl.full([64], 0, gl.int32, WARP)
        for w in gl.static_range(self.GROUPS):
            total = self.totals.index(work % self.STAGES * self.GROUPS + w).load(WARP)
            bad = gl.maximum(bad, overflowed(total, self.DTYPE))
        some = (work >= self.STAGES) & (self.words.read(at) == 0) & (gl.max(bad, 0) != 0)
        if some:
            barrier()
            self.words.write(at, 1, 4)
            barrier()
        return some.to(gl.int32)


@gluon.jit
def places(STAGES: gl.constexpr, GROUPS: gl.constexpr, DTYPE: gl.constexpr):
    """Memory for STAGES of them, of GROUPS consumers whose weights are of DTYPE."""
    totals = gl.allocate_shared_memory(gl.float32, [STAGES * GROUPS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Places(words(4 * STAGES), totals, STAGES, GROUPS, DTYPE)


@aggregate
class Change:
    """How a product becomes a score, and a weight a dropped one."""

    bias: gl.tensor
    slopes: gl.tensor
    sinks: gl.tensor
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
    SINKS: gl.constexpr
    DROPOUT: gl.constexpr
    FOLD: gl.constexpr
    LEFT: gl.constexpr
    RAGGED: gl.constexpr
    SINGLE: gl.constexpr

    @gluon.jit
    def of_head(self, b, h):
        """(ALiBi slope, logit of the sink in base 2 or -inf) of a query head."""
        slope = 0.0
        if self.ALIBI:
            slope = gl.load(self.slopes + b * self.stride_sb + h).to(gl.float32)
        sink = float("-inf")
        if self.SINKS:
            sink = gl.load(self.sinks + h).to(gl.float32) * LOG2E
        return slope, sink

    @gluon.jit
    def bias_of(self, b, h, row):
        """Where the bias of a head's row lies."""
        at = b.to(gl.int64) * self.stride_bb + h.to(gl.int64) * self.stride_bh + row.to(gl.int64) * self.stride_bm
        return self.bias + at * self.BIAS_ALIGN


@aggregate
class Rows:
    """The query rows of one consumer: which they are, what they see, and what their scores depend on."""

    first: gl.tensor
    row: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    q_len: gl.tensor
    k_len: gl.tensor
    bh: gl.tensor
    bias: gl.tensor
    slope: gl.tensor
    seed_low: gl.tensor
    seed_high: gl.tensor
    offset: gl.tensor
    WG: gl.constexpr
