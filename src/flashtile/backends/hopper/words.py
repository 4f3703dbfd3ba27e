"""Single numbers in shared memory, which one role leaves for the others. Who may read when is for barriers to say."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.dialect import aggregate


@aggregate
class Words:
    """A number at each of so many places."""

    memory: gl.shared_memory_descriptor

    @gluon.jit
    def write(self, at, value, WARPS: gl.constexpr):
        """Leaves a number; WARPS: of the caller, whose threads all know it."""
        ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        self.memory.index(at).store(gl.full([1], 0, gl.int32, ONE) + value)

    @gluon.jit
    def read(self, at, WARPS: gl.constexpr = 4):
        """A number; WARPS: of the caller."""
        ONE: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
        return gl.max(self.memory.index(at).load(ONE), 0)


@gluon.jit
def words(COUNT: gl.constexpr):
    """Memory for COUNT numbers."""
    return Words(gl.allocate_shared_memory(gl.int32, [COUNT, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])))
