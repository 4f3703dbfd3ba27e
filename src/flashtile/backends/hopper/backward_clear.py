"""Zeros for dQ's accumulator from a launch that does not add to it (backward_errands.py)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from flashtile.backends.hopper.dialect import aggregate, barrier, store


@aggregate
class Clearing:
    """What is cleared: `boxes` boxes of dQ's accumulator. zeros: shared memory for one."""

    dq: tma.tensor_descriptor
    zeros: gl.shared_memory_descriptor
    boxes: gl.tensor
    ACTIVE: gl.constexpr

    @gluon.jit
    def begin(self):
        """Fills the shared memory with zeros. For four warps."""
        if self.ACTIVE:
            LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
            self.zeros.store(gl.full(self.zeros.shape, 0.0, gl.float32, LAYOUT))
            fence_async_shared()
            barrier()

    @gluon.jit
    def portions(self):
        """How many there are: boxes."""
        return self.boxes if self.ACTIVE else 0

    @gluon.jit
    def run(self, box):
        """Clears a box, if it exists, when all but the one before are."""
        if self.ACTIVE:
            if box < self.boxes:
                store(self.dq, [box * self.zeros.shape[0], 0], self.zeros)
                tma.store_wait(1)
