"""Who writes to a block of dQ when: in a fixed order where the call is deterministic, else in any.

Of short walks the first tile of keys that comes to a block stores it, and the others add: that spares zeros there
beforehand, as much memory traffic as dQ itself.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.descriptors import await_writes
from flashtile.backends.hopper.dialect import aggregate, barrier

# What is known of a block that does not begin with zeros; 0 as long as no tile has come to it, and where none will.
CLAIMED = gl.constexpr(1)
STORED = gl.constexpr(3)


@aggregate
class Turns:
    """What the warp group that makes dQ asks before it writes to a block, and says afterwards.

    blocks: a number for each. CLEARED: blocks begin with zeros; else it is one of the states above. STEPS: blocks that
    are passed on together in a fixed order, 0 where there is none. The number of the first one is how many tiles have
    added to them, the last tile first; tiles are started in that order, so that none waits for one that cannot run.
    ASKS_AHEAD: whether a turn is asked for before the product whose result needs it.
    """

    blocks: gl.tensor
    CLEARED: gl.constexpr
    STEPS: gl.constexpr
    ASKS_AHEAD: gl.constexpr

    @gluon.jit
    def unit(self, block):
        """The block whose number stands for a block's."""
        return block // self.STEPS * self.STEPS if self.STEPS > 0 else block

    @gluon.jit
    def look(self, block):
        """Asks for the number of a block. The answer, for those below, is on its way meanwhile.

        It acquires nothing: what follows is an addition by TMA, made in the cache that the answer came from.
        """
        if self.CLEARED and not self.ASKS_AHEAD:
            return 0
        else:
            LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            lane = gl.arange(0, 128, layout=LINE)
            return gl.load(self.blocks + block + lane, mask=lane == 0, other=0, volatile=True)

    @gluon.jit
    def is_first(self, block, seen):
        """True where the caller is to store a block, for nobody has; else waits until somebody has. seen: what `look`
        answered a while ago.
        """
        if self.CLEARED:
            return False
        else:
            state = gl.max(seen, 0)
            if state != STORED:
                state = gl.atomic_or(self.blocks + block, CLAIMED, sem="acquire")
                while state == CLAIMED:
                    state = gl.atomic_add(self.blocks + block, 0, sem="acquire")
            return state == 0

    @gluon.jit
    def await_turn(self, block, seen, before):
        """Waits until `before` tiles have added to a block, if any are to. seen: what `look` answered, if it asked."""
        if before > 0:
            count = gl.max(seen, 0) if self.ASKS_AHEAD else gl.to_tensor(0)
            while count < before:
                count = gl.atomic_add(self.blocks + block, 0, sem="acquire")

    @gluon.jit
    def pass_on(self, block):
        """Lets others add to a block, once everything that was written here has reached memory; below 0: to none."""
        if self.STEPS > 0 or not self.CLEARED:
            if block >= 0:
                await_writes(block)
                barrier()
                # Relaxed it arrives before what was written, once in a while.
                if self.STEPS > 0:
                    gl.atomic_add(self.blocks + block, 1, sem="release")
                else:
                    gl.atomic_or(self.blocks + block, STORED, sem="release")
