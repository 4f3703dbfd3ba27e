"""dQ from its float32 accumulator, in a launch that does not add to it (backward_errands.py)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.dialect import aggregate

WIDTH = gl.constexpr(64)  # columns of a part


@aggregate
class Conversion:
    """Parts of 64 rows and 64 columns, which lie in the accumulator in the order of a product's registers.

    written: for each 64 rows whether anything lies there, unless CLEARED. stride_x*: of dq. scratch: rows of the
    accumulator, D its columns. scale: of dQ.
    """

    accumulated: gl.tensor
    written: gl.tensor
    dq: gl.tensor
    stride_xb: gl.tensor
    stride_xm: gl.tensor
    stride_xh: gl.tensor
    heads: gl.tensor
    q_len: gl.tensor
    padded: gl.tensor
    scratch: gl.tensor
    scale: gl.tensor
    COLUMNS: gl.constexpr
    D: gl.constexpr
    X_STEP: gl.constexpr
    CLEARED: gl.constexpr
    ACTIVE: gl.constexpr

    @gluon.jit
    def portions(self):
        """How many there are: parts."""
        return self.scratch // 64 * (self.D // WIDTH) if self.ACTIVE else 0

    @gluon.jit
    def run(self, part):
        """A part of dQ, if it exists. For four warps."""
        if self.ACTIVE:
            if part < self.portions():
                LINE: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
                LAYOUT: gl.constexpr = gl.BlockedLayout([2, 8], [8, 4], [4, 1], [1, 0])
                PARTS: gl.constexpr = self.D // WIDTH
                block = part // PARTS
                x = gl.load(self.accumulated + part.to(gl.int64) * (64 * WIDTH) + gl.arange(0, 64 * WIDTH, layout=LINE))
                # column // 8, warp, row % 8, column % 8 // 2, row // 8 % 2, column % 2
                x = x.reshape([WIDTH // 8, 4, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5]).reshape([64, WIDTH])
                if not self.CLEARED:
                    x = gl.where(gl.load(self.written + block) > 0, x, 0.0)
                x = gl.convert_layout((x * self.scale).to(self.dq.dtype.element_ty), LAYOUT)
                bh = block * 64 // self.padded
                b, h = (bh // self.heads).to(gl.int64), (bh % self.heads).to(gl.int64)
                row = block * 64 % self.padded + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))
                column = part % PARTS * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))[None, :]
                exists = (row < self.q_len)[:, None] & (column < self.COLUMNS)
                row = row.to(gl.int64)[:, None]
                at = self.dq + b * self.stride_xb + h * self.stride_xh + row * self.stride_xm + column * self.X_STEP
                gl.store(at, x, mask=exists)
