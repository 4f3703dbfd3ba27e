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
    """What the warp group that makes dQ asks before it writes to a block.

    blocks: a number for each. CLEARED: blocks begin with zeros; else it is one of the states above. ORDERED: it is how
    many tiles have added, the last tile first; they are started in that order, so that none waits for one that cannot
    run. STEPS: blocks that are passed on together there, for which the first one's number stands.
    """

    blocks: gl.tensor
    CLEARED: gl.constexpr
    ORDERED: gl.constexpr
    STEPS: gl.constexpr

    @gluon.jit
    def look(self, block):
        """Asks for the state of a block. The answer, for `is_first`, is on its way meanwhile.

        It acquires nothing: what follows is an addition by TMA, made in the cache that the answer came from.
        """
        if self.CLEARED:
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
    def publish(self, block):
        """Lets others add to a block that was stored here; below 0: none was."""
        if not self.CLEARED:
            if block >= 0:
                await_writes(block)
                barrier()
                # Relaxed it arrives before what was stored, once in a while.
                gl.atomic_or(self.blocks + block, STORED, sem="release")

    @gluon.jit
    def await_turn(self, block, before):
        """Waits until `before` tiles have added to a block."""
        if self.ORDERED:
            seen = gl.atomic_add(self.blocks + block, 0, sem="acquire")
            while seen < before:
                seen = gl.atomic_add(self.blocks + block, 0, sem="acquire")

    @gluon.jit
    def pass_on(self, block):
        """Lets the next tile add to a block, once everything that was added here has reached memory."""
        if self.ORDERED:
            await_writes(block)
            barrier()
            gl.atomic_add(self.blocks + block, 1, sem="release")
