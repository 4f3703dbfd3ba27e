"""A ring of tiles in shared memory between one producer and its consumers.

The n-th tile of a kernel's life lies in slot n % STAGES. A slot is full when its bytes have arrived and empty when
every consumer has released it; both barriers flip a phase bit on each round. A barrier that has never flipped lets a
wait for the other phase pass, so that the producer finds the first round empty without anybody having said so.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashtile.backends.hopper.dialect import aggregate


@aggregate
class Ring:
    """buffers [STAGES, ...]; full, empty: one barrier for each slot."""

    buffers: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.jit
    def place(self, n):
        """Which of the slots is number n; n may be unsigned, which takes fewer instructions."""
        return gl.to_tensor(n % self.STAGES).to(gl.int32)

    @gluon.jit
    def phase(self, n):
        """The phase bit that ends the round of slot n."""
        return gl.to_tensor(n // self.STAGES).to(gl.int32) & 1

    @gluon.jit
    def slot(self, n):
        return self.buffers.index(self.place(n))

    @gluon.jit
    def claim(self, n, NBYTES: gl.constexpr):
        """The producer's: waits until slot n is empty and announces its bytes; returns the barrier they arrive at."""
        self.await_empty(n)
        return self.expect(n, NBYTES)

    @gluon.jit
    def await_empty(self, n):
        """A producer's: waits until slot n is empty."""
        mbarrier.wait(self.empty.index(self.place(n)), self.phase(n) ^ 1)

    @gluon.jit
    def expect(self, n, NBYTES: gl.constexpr):
        """The producer's: announces the bytes that come to the empty slot n; returns the barrier they arrive at."""
        full = self.arrival(n)
        mbarrier.expect(full, NBYTES)
        return full

    @gluon.jit
    def arrival(self, n):
        """The barrier at which the bytes of slot n arrive."""
        return self.full.index(self.place(n))

    @gluon.jit
    def announce(self, n):
        """A producer's that writes by itself: it has written slot n."""
        mbarrier.arrive(self.full.index(self.place(n)), count=1)

    @gluon.jit
    def await_full(self, n):
        """A consumer's: waits until the bytes of slot n have arrived."""
        mbarrier.wait(self.full.index(self.place(n)), self.phase(n))

    @gluon.jit
    def wait(self, n):
        """A consumer's: slot n, once it is full."""
        self.await_full(n)
        return self.slot(n)

    @gluon.jit
    def release(self, n):
        """A consumer's: it has read slot n for the last time."""
        mbarrier.arrive(self.empty.index(self.place(n)), count=1)


@gluon.jit
def ring(
    dtype: gl.constexpr,
    ROWS: gl.constexpr,
    DIM: gl.constexpr,
    layout: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
):
    """A ring of STAGES tiles [ROWS, DIM], each released by CONSUMERS partitions."""
    buffers = gl.allocate_shared_memory(dtype, [STAGES, ROWS, DIM], layout)
    return Ring(buffers, barriers(STAGES, 1), barriers(STAGES, CONSUMERS), STAGES)


@gluon.jit
def first_slot():
    """0, unsigned: its remainders, which each step needs, take fewer instructions."""
    return gl.to_tensor(0).to(gl.uint32)


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT fresh barriers that flip after ARRIVALS arrivals. A fence must follow before anybody uses them."""
    new = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(new.index(i), count=ARRIVALS)
    return new
