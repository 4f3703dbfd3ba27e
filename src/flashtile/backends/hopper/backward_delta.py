"""delta = rowsum(dO O) from a launch that does not need it (backward_errands.py)."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.dialect import aggregate

ROWS = gl.constexpr(16)  # of a portion: two tiles of 16 bits in the registers of four warps


@aggregate
class Deltas:
    """Portions of the rows of the scratch, in which `deltas` lie, 0 for rows that do not exist.

    scratch: rows. stride_o*, stride_y*: of out and dout.
    """

    out: gl.tensor
    dout: gl.tensor
    deltas: gl.tensor
    stride_ob: gl.tensor
    stride_om: gl.tensor
    stride_oh: gl.tensor
    stride_yb: gl.tensor
    stride_ym: gl.tensor
    stride_yh: gl.tensor
    heads: gl.tensor
    q_len: gl.tensor
    padded: gl.tensor
    scratch: gl.tensor
    COLUMNS: gl.constexpr
    DV: gl.constexpr
    O_STEP: gl.constexpr
    Y_STEP: gl.constexpr
    ACTIVE: gl.constexpr

    @gluon.jit
    def portions(self):
        """How many there are."""
        return self.scratch // ROWS if self.ACTIVE else 0

    @gluon.jit
    def run(self, portion):
        """The deltas of a portion, if it exists. For four warps."""
        if self.ACTIVE:
            if portion * ROWS < self.scratch:
                LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // self.DV, self.DV // 8], [4, 1], [1, 0])
                first = portion * ROWS
                bh = first // self.padded
                b, h = (bh // self.heads).to(gl.int64), (bh % self.heads).to(gl.int64)
                row = first % self.padded + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
                column = gl.arange(0, self.DV, layout=gl.SliceLayout(0, LAYOUT))[None, :]
                exists = (row < self.q_len)[:, None] & (column < self.COLUMNS)
                row = row.to(gl.int64)[:, None]
                at = self.out + b * self.stride_ob + h * self.stride_oh + row * self.stride_om
                o = gl.load(at + column * self.O_STEP, mask=exists, other=0.0)
                at = self.dout + b * self.stride_yb + h * self.stride_yh + row * self.stride_ym
                do = gl.load(at + column * self.Y_STEP, mask=exists, other=0.0)
                delta = gl.sum(o.to(gl.float32) * do.to(gl.float32), 1)
                gl.store(self.deltas + first + gl.arange(0, ROWS, layout=delta.type.layout), delta)
