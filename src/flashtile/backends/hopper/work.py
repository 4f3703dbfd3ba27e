"""What the roles of the forward kernel share: where the work lies, and what a score depends on."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.dialect import aggregate
from flashtile.gpu.intervals import interval, split
from flashtile.gpu.scores import LOG2E
from flashtile.gpu.sequences import place, sequence


@aggregate
class Shapes:
    """Where the work lies: what every role needs to find its items, and the mask."""

    cu_q: gl.tensor
    cu_k: gl.tensor
    lo: gl.tensor
    hi: gl.tensor
    mailbox: gl.tensor
    batch: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    max_q: gl.tensor
    max_k: gl.tensor
    total_q: gl.tensor
    total_k: gl.tensor
    tiles: gl.tensor
    programs: gl.tensor
    section: gl.tensor
    left: gl.tensor
    right: gl.tensor
    stride_tb: gl.tensor
    VARLEN: gl.constexpr
    KIND: gl.constexpr
    PAIRED: gl.constexpr
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
        if self.BATCH_FIRST:
            return tile, bh % self.batch, bh // self.batch
        else:
            return tile, bh // self.heads, bh % self.heads

    @gluon.jit
    def skips(self, turn, tile):
        """True for the middle tile's mirror image, itself."""
        if self.PAIRED:
            return (turn % 2 == 1) & (2 * tile + 1 == self.tiles)
        return False

    @gluon.jit
    def turns(self):
        """How many items this program has."""
        per_head = (self.tiles + 1) // 2 if self.PAIRED else self.tiles
        units = (per_head * self.programs - gl.program_id(0) + gl.num_programs(0) - 1) // gl.num_programs(0)
        return units * 2 if self.PAIRED else units

    @gluon.jit
    def sequences(self, b, check):
        """(q_start, q_len, k_start, k_len) of sequence b. Packed rows past the last sequence are one more, `batch`,
        of which q_len says that it is empty.
        """
        real = gl.minimum(b, self.batch - 1)
        q_start, q_len = sequence(self.cu_q, real, self.max_q, self.total_q, 0, self.mailbox, self.VARLEN, check)
        k_start, k_len = sequence(self.cu_k, real, self.max_k, self.total_k, 2, self.mailbox, self.VARLEN, check)
        if self.VARLEN:
            q_len = gl.where(b < self.batch, q_len, 0)
        return q_start, q_len, k_start, k_len

    @gluon.jit
    def lse_row(self, b, h, start):
        """Where the lse of a sequence's first row lies."""
        if self.VARLEN:
            return h.to(gl.int64) * self.total_q + start
        else:
            return (b * self.heads + h).to(gl.int64) * self.max_q

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
