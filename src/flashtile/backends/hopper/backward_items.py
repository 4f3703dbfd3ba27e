"""Items of the backward on Hopper, tiles of keys: where one lies, and how programs come to theirs."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashtile.backends.hopper.backward_work import KEYS, whole
from flashtile.backends.hopper.dialect import aggregate, barrier
from flashtile.backends.hopper.lengths import Lengths
from flashtile.backends.hopper.words import Words
from flashtile.gpu.sequences import place as place_in_section
from flashtile.gpu.sequences import scratch_row

# Words for an item, the walks of at most three consumers, two bounds, a direction, heads: an even number, so that two
# neighbours are read at once. Shared memory has no room for more (head dim 64, bias, in a fixed order).
RECORD = gl.constexpr(26)
LARGEST = gl.constexpr(6e4)  # what float16 surely holds, also of a sum that was rounded


@aggregate
class Place:
    """One tile of keys: its sequence, its key-value head and the query heads that share it. turn: which of a program's
    items. member, together: the first of its query heads that it is gone through with, and how many. AROUND: its walk
    begins with query tiles of its own, and comes to those before them at the end. mirrored, where MIRRORS says that
    there are such: its walk goes from the last query tile to the first, and its first consumer has its last keys.
    """

    turn: gl.tensor
    tile: gl.tensor
    b: gl.tensor
    kv_h: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    member: gl.tensor
    together: gl.tensor
    first_key: gl.tensor
    q_start: gl.tensor
    q_len: gl.tensor
    k_start: gl.tensor
    k_len: gl.tensor
    scratch: gl.tensor
    padded: gl.tensor
    mirrored: gl.tensor
    VARLEN: gl.constexpr
    BLOCK_M: gl.constexpr
    BLOCK_N: gl.constexpr
    AROUND: gl.constexpr
    MIRRORS: gl.constexpr

    @gluon.jit
    def query_tile(self, i, count):
        """Which of `count` query tiles the walk comes to as the i-th."""
        if self.AROUND:
            i += self.tile * (self.BLOCK_N // self.BLOCK_M)
            return gl.where(i >= count, i - count, i)
        elif self.MIRRORS:
            return gl.where(self.mirrored, gl.cdiv(self.q_len, self.BLOCK_M) - 1 - i, i)
        else:
            return i

    @gluon.jit
    def blocks(self, spans):
        """[first, last) of the query tiles themselves."""
        first, last = whole(spans)
        if self.MIRRORS:
            end = gl.cdiv(self.q_len, self.BLOCK_M)
            first, last = gl.where(self.mirrored, end - last, first), gl.where(self.mirrored, end - first, last)
        return first, last

    @gluon.jit
    def key(self, w):
        """The first of the 64 keys of consumer w."""
        if self.MIRRORS:
            w = gl.where(self.mirrored, self.BLOCK_N // KEYS - 1 - w, w)
        return self.first_key + KEYS * w

    @gluon.jit
    def mirror(self, walk, other):
        """The walk of a consumer, or, mirrored, that of the other one, the last query tile first."""
        if self.MIRRORS:
            tiles = gl.cdiv(self.q_len, self.BLOCK_M)
            start, full, partial, stop = other
            return (
                gl.where(self.mirrored, tiles - stop, walk[0]),
                gl.where(self.mirrored, tiles - partial, walk[1]),
                gl.where(self.mirrored, tiles - full, walk[2]),
                gl.where(self.mirrored, tiles - start, walk[3]),
            )
        else:
            return walk

    @gluon.jit
    def head(self, g):
        """The g-th query head of the item."""
        return self.kv_h * self.group + self.member + g

    @gluon.jit
    def is_last(self):
        """True where no other round of the group follows."""
        return self.member + self.together == self.group

    @gluon.jit
    def block(self, g):
        """The first block of BLOCK_M rows of the g-th query head in the scratch."""
        return (self.scratch + g * self.padded) // self.BLOCK_M


@aggregate
class Items:
    """Tiles of keys, which programs take from a counter in memory as they become free.

    Numbers are given out in order, and only to programs that run: what waits for tiles with smaller numbers never
    waits for one that cannot start. One role takes them, works out where they lie and which query tiles see them, and
    leaves that in shared memory, for a program's present item and its next: the others read a few words between two
    items, when all of them stand still, where they would each divide and look up the same. PRODUCTS: what
    backward_prologue.products says. RELAYS: each query head of a group comes to the first `alone` of `tiles` tiles in a
    round of its own (backward_relay.py), to the others in the first round; cohort: key-value heads that go through all
    rounds before others begin.
    """

    counter: gl.tensor
    records: Words
    announced: gl.shared_memory_descriptor
    lengths: Lengths
    rows: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    padded: gl.tensor
    scratch: gl.tensor
    tiles: gl.tensor
    alone: gl.tensor
    first_program: gl.tensor
    programs: gl.tensor
    cohort: gl.tensor
    section: gl.tensor
    REVERSED: gl.constexpr
    BLOCK_M: gl.constexpr
    GROUPS: gl.constexpr
    PRODUCTS: gl.constexpr
    AROUND: gl.constexpr
    MIRRORS: gl.constexpr
    RELAYS: gl.constexpr

    @gluon.jit
    def take(self, turn, mask, WARPS: gl.constexpr):
        """Takes the program's item number `turn` and tells the other roles, which are done with the one of two turns
        before. Returns its Place and walks; a tile below 0: there is none. WARPS: of the caller.
        """
        place = self._place(turn, gl.atomic_add(self.counter, 1, sem="relaxed"))
        if self.lengths.VARLEN:
            while (place.tile >= 0) & (place.first_key >= place.k_len):
                place = self._place(turn, gl.atomic_add(self.counter, 1, sem="relaxed"))
        spans = mask.walks(place, self.GROUPS)
        at = turn % 2 * RECORD
        self.records.write(at, place.tile, WARPS)
        self.records.write(at + 1, place.b, WARPS)
        self.records.write(at + 2, place.kv_h, WARPS)
        self.records.write(at + 3, place.scratch, WARPS)
        if self.lengths.VARLEN:
            self.records.write(at + 4, place.q_start, WARPS)
            self.records.write(at + 5, place.q_len, WARPS)
            self.records.write(at + 6, place.k_start, WARPS)
            self.records.write(at + 7, place.k_len, WARPS)
        if self.MIRRORS:
            self.records.write(at + 22, place.mirrored.to(gl.int32), WARPS)
        if self.RELAYS:
            self.records.write(at + 23, place.member, WARPS)
            self.records.write(at + 24, place.together, WARPS)
        for w in gl.static_range(self.GROUPS):
            for i in gl.static_range(4):
                self.records.write(at + 8 + 4 * w + i, spans[w][i], WARPS)
        if self.PRODUCTS == "bounded":
            dout, delta = self._bounds(place, spans, WARPS)
            self.records.write(at + 20, dout.to(gl.int32, bitcast=True), WARPS)
            self.records.write(at + 21, delta.to(gl.int32, bitcast=True), WARPS)
        barrier()
        mbarrier.arrive(self.announced.index(turn % 2), count=1)
        return place, spans

    @gluon.jit
    def wait(self, turn):
        """The Place and walks of the program's item number `turn`, for a role of four warps."""
        mbarrier.wait(self.announced.index(turn % 2), (turn // 2) & 1)
        first = self._walk(turn, 0)
        if self.GROUPS == 1:
            return self.place(turn), (first,)
        elif self.GROUPS == 2:
            return self.place(turn), (first, self._walk(turn, 1))
        else:
            return self.place(turn), (first, self._walk(turn, 1), self._walk(turn, 2))

    @gluon.jit
    def place(self, turn):
        """The Place of an item that was waited for. Asking twice saves registers between."""
        at = turn % 2 * RECORD
        tile = self.records.read(at)
        b = self.records.read(at + 1)
        kv_h = self.records.read(at + 2)
        scratch = gl.multiple_of(self.records.read(at + 3), 128)
        q_start, q_len = gl.to_tensor(0), self.lengths.max_q
        k_start, k_len = gl.to_tensor(0), self.lengths.max_k
        if self.lengths.VARLEN:
            q_start, q_len = self.records.read(at + 4), self.records.read(at + 5)
            k_start, k_len = self.records.read(at + 6), self.records.read(at + 7)
        mirrored = self.records.read(at + 22) > 0 if self.MIRRORS else gl.to_tensor(False)
        member, together = gl.to_tensor(0), self.group
        if self.RELAYS:
            member, together = self.records.read(at + 23), self.records.read(at + 24)
        return self._at(turn, tile, b, kv_h, member, together, q_start, q_len, k_start, k_len, scratch, mirrored)

    @gluon.jit
    def _bounds(self, place, spans, WARPS: gl.constexpr):
        """(Length of the longest row of dO, largest delta) of all rows that see some of an item's keys."""
        LINE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        line = gl.arange(0, 32, layout=LINE)
        dout, delta = gl.full([32], 0.0, gl.float32, LINE), gl.full([32], 0.0, gl.float32, LINE)
        first, last = place.blocks(spans)
        douts = self.rows + 2 * self.scratch
        deltas = douts + self.scratch // self.BLOCK_M
        for g in range(place.together):
            block = place.block(g)
            for i in range(first, last, 32):
                exists = i + line < last
                dout = gl.maximum(dout, gl.load(douts + block + i + line, mask=exists, other=0.0))
                delta = gl.maximum(delta, gl.load(deltas + block + i + line, mask=exists, other=0.0))
        return gl.max(dout, 0), gl.max(delta, 0)

    @gluon.jit
    def narrow(self, turn, v):
        """True where 16 bits hold all dP - delta of an item's rows and of 64 keys with values v: a product of two rows
        is at most that of their lengths.
        """
        if self.PRODUCTS == "bounded":
            at = turn % 2 * RECORD
            dout = self.records.read(at + 20).to(gl.float32, bitcast=True)
            delta = self.records.read(at + 21).to(gl.float32, bitcast=True)
            x = v.load(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])).to(gl.float32)
            return gl.sqrt(gl.max(gl.sum(x * x, 1), 0)) * dout + delta < LARGEST
        else:
            return False

    @gluon.jit
    def _walk(self, turn, w):
        records = self.records
        at = turn % 2 * RECORD + 8 + 4 * w
        return records.read(at), records.read(at + 1), records.read(at + 2), records.read(at + 3)

    @gluon.jit
    def _place(self, turn, item):
        """The Place of an item: the key-value heads of a section side by side, their first tiles first (REVERSED: last,
        but in every other section where MIRRORS).
        """
        last = self._items_of_a_head() * self.programs - 1
        tile, tiles, bh, member = self._in_order(gl.minimum(item, last))
        mirrored = bh // self.section % 2 > 0 if self.MIRRORS else gl.to_tensor(False)
        if self.REVERSED:
            tile = gl.where(mirrored, tile, tiles - 1 - tile)
        together = gl.where(tile < self.alone, 1, self.group) if self.RELAYS else self.group
        bh += self.first_program
        kv_heads = self.heads // self.group
        b = bh // kv_heads
        kv_h = bh % kv_heads
        q_start, q_len, k_start, k_len = self.lengths.of(b, False)
        first_head = kv_h * self.group + member
        scratch = scratch_row(b, first_head, self.heads, q_start, self.padded, self.lengths.VARLEN)
        tile = gl.where(item > last, -1, tile)
        return self._at(turn, tile, b, kv_h, member, together, q_start, q_len, k_start, k_len, scratch, mirrored)

    @gluon.jit
    def _in_order(self, item):
        """(Tile, tiles of its round, key-value head of all batches, first member of its group) of an item: where items
        relay, a cohort goes through a round section by section, and then through the next.
        """
        if self.RELAYS:
            size = self._items_of_a_head() * self.cohort
            first = item // size * self.cohort
            heads = gl.minimum(self.cohort, self.programs - first)
            # The first round goes through all tiles, each other one through those that have rounds.
            within = item % size
            later = within - self.tiles * heads
            in_first = later < 0
            tiles = gl.where(in_first, self.tiles, self.alone)
            member = gl.where(in_first, 0, 1 + later // (self.alone * heads))
            tile, bh = place_in_section(
                gl.where(in_first, within, later % (self.alone * heads)), tiles, heads, self.section
            )
            return tile, tiles, first + bh, member
        else:
            tile, bh = place_in_section(item, self.tiles, self.programs, self.section)
            return tile, self.tiles, bh, gl.to_tensor(0)

    @gluon.jit
    def _items_of_a_head(self):
        """Items of a key-value head."""
        return self.tiles + (self.group - 1) * self.alone if self.RELAYS else self.tiles

    @gluon.jit
    def _at(self, turn, tile, b, kv_h, member, together, q_start, q_len, k_start, k_len, scratch, mirrored):
        first_key = gl.maximum(tile, 0) * (self.GROUPS * KEYS)  # walks are worked out for no item, too
        return Place(
            turn, tile, b, kv_h, self.heads, self.group, member, together, first_key, q_start, q_len, k_start, k_len,
            scratch, self.padded, mirrored, self.lengths.VARLEN, self.BLOCK_M, self.GROUPS * KEYS, self.AROUND,
            self.MIRRORS,
        )  # fmt: skip
