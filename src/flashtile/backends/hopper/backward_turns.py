"""Who writes to a block of dQ when: in a fixed order where the call is deterministic, else in any.

In a fixed order, and of short walks in any, the first tile of keys that comes to a block stores it, and the others add:
that spares zeros there beforehand, as much memory traffic as dQ itself.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.descriptors import await_writes
from flashtile.backends.hopper.dialect import aggregate, barrier
from flashtile.backends.hopper.rings import Ring
from flashtile.backends.hopper.words import Words

# What is known of a block that does not begin with zeros; 0 as long as no tile has come to it, and where none will.
CLAIMED = gl.constexpr(1)
STORED = gl.constexpr(3)

NO_MORE = gl.constexpr(-1)  # the last notice

COUNTERS = gl.constexpr(3)  # of items, one for each launch, before the numbers of blocks


@aggregate
class Turns:
    """What the warp group that makes dQ asks before it writes to a block, and says afterwards.

    blocks: a number for each. STEPS: blocks that are passed on together in a fixed order, 0 where there is none. In an
    order the number of the first one is how many tiles have written to them, the last tile first or, mirrored, the
    first; tiles are started in that order, so that none waits for one that cannot run. Without, it is one of the states
    above. CLEARED: blocks begin with zeros, and nobody stores; in pairs always. notices: the blocks that `notify` is to
    pass on, where NOTIFIES says that a warp is there for it.
    """

    blocks: gl.tensor
    notices: Ring
    CLEARED: gl.constexpr
    STEPS: gl.constexpr
    NOTIFIES: gl.constexpr

    @gluon.jit
    def unit(self, block):
        """The block whose number stands for a block's."""
        return block // self.STEPS * self.STEPS if self.STEPS > 0 else block

    @gluon.jit
    def look(self, block):
        """Asks for the number of a block. The answer, for those below, is on its way meanwhile.

        It acquires nothing: what follows is an addition by TMA, made in the cache that the answer came from.
        """
        if self.CLEARED:
            return 0
        else:
            LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            lane = gl.arange(0, 128, layout=LINE)
            return gl.load(self.blocks + block + lane, mask=lane == 0, other=0, volatile=True)

    @gluon.jit
    def is_first(self, block, seen, before):
        """True where the caller is to store a block, for nobody has. Where there is no order, else waits until somebody
        has. seen: what `look` answered a while ago; before: how many tiles write to it first in an order.
        """
        if self.CLEARED:
            return False
        elif self.STEPS > 0:
            return before == 0
        else:
            state = gl.max(seen, 0)
            if state != STORED:
                state = gl.atomic_or(self.blocks + block, CLAIMED, sem="acquire")
                while state == CLAIMED:
                    state = gl.atomic_add(self.blocks + block, 0, sem="acquire")
            return state == 0

    @gluon.jit
    def await_turn(self, block, seen, before):
        """Waits until `before` tiles have written to a block, if any are to. seen: what `look` answered, if asked."""
        if before > 0:
            count = gl.max(seen, 0) if self.NOTIFIES and not self.CLEARED else gl.to_tensor(0)
            while count < before:
                count = gl.atomic_add(self.blocks + block, 0, sem="acquire")

    @gluon.jit
    def pass_on(self, block, n):
        """Lets others add to a block, once everything that was written here has reached memory; below 0: to none.
        n: how many were passed on before. Returns how many are now.
        """
        if self.STEPS > 0 or not self.CLEARED:
            if block >= 0:
                await_writes(block)
                if self.NOTIFIES:
                    self._leave_notice(block, n)
                else:
                    barrier()
                    self.say(block)
        return n + gl.where(block >= 0, 1, 0)

    @gluon.jit
    def close(self, n):
        """Passes nothing on any more."""
        if self.NOTIFIES:
            self._leave_notice(NO_MORE, n)

    @gluon.jit
    def _leave_notice(self, block, n):
        self.notices.await_empty(n)
        Words(self.notices.buffers).write(n % self.notices.STAGES, block, 4)
        barrier()
        self.notices.announce(n)

    @gluon.jit
    def say(self, block):
        """Others may add to a block. Relaxed, this arrives before what was written, once in a while; the fence that it
        has instead takes a seventh of a step (head dim 256, causal, 4096: 2180 us, and 1868 without).
        """
        if self.STEPS > 0:
            gl.atomic_add(self.blocks + block, 1, sem="release")
        else:
            gl.atomic_or(self.blocks + block, STORED, sem="release")


@gluon.jit
def notify(turns):
    """The role of a warp that has nothing else to do, and can wait until what it says may be said."""
    if turns.NOTIFIES:
        n = 0
        block = gl.to_tensor(0)
        while block != NO_MORE:
            turns.notices.await_full(n)
            block = Words(turns.notices.buffers).read(n % turns.notices.STAGES, 1)
            turns.notices.release(n)
            if block != NO_MORE:
                turns.say(block)
            n += 1
