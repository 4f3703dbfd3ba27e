"""dK and dV where each query head of a group comes in a round of its own: between two, a tile's sums lie in memory.

A program that goes through a whole group with one tile of keys sums in registers. But short walks are soon at the
group's next heads when long ones are still at its first, and the rows of all heads want to be in the L2 cache at once.
Round by round all tiles follow each other through the rows of one head. The sums are made in the same order. The last
tiles may have no rounds (`alone` in backward_configs.py says how many have).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.backward_work import KEYS
from flashtile.backends.hopper.dialect import aggregate, barrier
from flashtile.backends.hopper.tiles import accumulator
from flashtile.gpu.sequences import scratch_row


@aggregate
class NoRelay:
    """Stands in where an item is gone through with all heads of its group, and nothing waits."""

    RELAYS: gl.constexpr

    @gluon.jit
    def await_turn(self, place, w, WHICH: gl.constexpr):
        pass

    @gluon.jit
    def begin(self, place, w, COLUMN: gl.constexpr, COLUMNS: gl.constexpr):
        return gl.zeros([KEYS, COLUMNS], gl.float32, accumulator(COLUMNS))


@aggregate
class Relay:
    """Where the sums lie, float32, a row of WIDTH columns for each key, and how many rounds they are of: a number for
    each 64 keys and each of at most two consumers that share them. kv_heads, padded: key-value heads, keys of each.
    """

    sums: gl.tensor
    numbers: gl.tensor
    kv_heads: gl.tensor
    padded: gl.tensor
    WIDTH: gl.constexpr
    RELAYS: gl.constexpr

    @gluon.jit
    def begin(self, place, w, COLUMN: gl.constexpr, COLUMNS: gl.constexpr):
        """COLUMNS columns from COLUMN on of the sums of consumer w's 64 keys: 0 in the first round. They are read once:
        the cache need not keep them.
        """
        goes_on = (place.member > 0) & (place.key(w) < place.k_len)
        return gl.load(self._at(place, w, COLUMN, COLUMNS), mask=goes_on, other=0.0, eviction_policy="evict_first")

    @gluon.jit
    def leave(self, place, w, sums, COLUMN: gl.constexpr):
        """Stores columns from COLUMN on for the next round."""
        at = self._at(place, w, COLUMN, sums.shape[1])
        gl.store(at, sums, mask=place.key(w) < place.k_len)

    @gluon.jit
    def await_turn(self, place, w, WHICH: gl.constexpr):
        """Waits until the rounds before have left their sums; WHICH: of the consumers of the same keys."""
        if (place.member > 0) & (place.key(w) < place.k_len):
            number = self._number(place, w, WHICH)
            count = gl.atomic_add(number, 0, sem="acquire")
            while count < place.member:
                count = gl.atomic_add(number, 0, sem="acquire")

    @gluon.jit
    def pass_on(self, place, w, WHICH: gl.constexpr):
        """Lets the next round go on from what all threads of the consumer have left."""
        barrier()
        if place.key(w) < place.k_len:
            gl.atomic_add(self._number(place, w, WHICH), 1, sem="release")

    @gluon.jit
    def _row(self, place, w):
        start = scratch_row(place.b, place.kv_h, self.kv_heads, place.k_start, self.padded, place.VARLEN)
        return start + place.key(w)

    @gluon.jit
    def _number(self, place, w, WHICH: gl.constexpr):
        return self.numbers + self._row(place, w) // KEYS * 2 + WHICH

    @gluon.jit
    def _at(self, place, w, COLUMN: gl.constexpr, COLUMNS: gl.constexpr):
        LAYOUT: gl.constexpr = accumulator(COLUMNS)
        row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, LAYOUT))[:, None]
        column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))[None, :]
        return self.sums + self._row(place, w).to(gl.int64) * self.WIDTH + COLUMN + row * self.WIDTH + column
