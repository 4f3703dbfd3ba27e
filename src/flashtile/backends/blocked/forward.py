"""Forward: for each block of query rows, an online softmax over the tiles of keys that the mask shows.

For a tile with scores S in units of log2 and the rows' running reference m, denominator l and sum O:

    P = 2^(S - m)      l += rowsum(P)      O += P V            at the end  O / l  and  lse = (m + log2 l) ln 2

The softmax is exact for any m that keeps P in range, so m is not the running maximum: after a row's first tile it moves
only where scores pass it by more than `_SLACK`, and most tiles rescale nothing. Where |scale| max|q| max|k| bounds all
scores (Cauchy-Schwarz), m stays 0 and a tile costs no subtraction and no maximum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashtile.backends.blocked import native
from flashtile.backends.blocked.configs import Config, pick_forward, working_dtype
from flashtile.backends.blocked.intervals import Tile, cover
from flashtile.backends.blocked.scores import Scoring, Scratch, factor, product
from flashtile.backends.blocked.slabs import Slab, slabs
from flashtile.problem import Call, Problem

# In powers of two: float32 and bfloat16 hold 2**127, and a row may sum up 2**31 weights times values of 2**32.
_SLACK = 32.0
_BOUND = 60.0

# A row of few keys may have one weight near 1, which is exact only as 2^0.
_KEYS_WORTH_BOUNDING = 256


def forward(problem: Problem, call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call, as the backend contract in docs/design.md says."""
    if native.serves(problem):
        return native.forward(problem, call, out)
    out = call.q.new_empty(problem.out_shape) if out is None else out
    lse = call.q.new_empty(problem.lse_shape, dtype=problem.lse_dtype)
    if problem.varlen:
        out.zero_()
        lse.fill_(-torch.inf)
    config, scratch = pick_forward(problem), Scratch(call.q)
    for slab in slabs(problem, call, config):
        _attend(problem, call, slab, config, scratch, slab.of_queries(out), slab.of_lse(lse))
    return out, lse


def _attend(
    problem: Problem, call: Call, slab: Slab, config: Config, scratch: Scratch, out: Tensor, lse: Tensor
) -> None:
    """One slab: writes out [batch, kv, q_len, group, v_dim] and lse [batch, kv, q_len, group]."""
    step = max(config.rows // slab.group, 1)
    rows = _Rows(problem, call, slab, scratch, once=slab.q_len <= step)
    back = slab.mask.transposed()
    for row in range(0, slab.q_len, step):
        row_end = min(row + step, slab.q_len)
        rows.start(row, row_end)
        for tile in cover(slab.mask, back, row, row_end, config.keys, config.edge):
            rows.see(tile)
        part_out, part_lse = rows.finish()
        out[:, :, row:row_end].copy_(part_out.view_as(out[:, :, row:row_end]))
        lse[:, :, row:row_end].copy_(part_lse.view_as(lse[:, :, row:row_end]))


class _Rows:
    """The running softmax of a block of rows; its tensors are [(units,) rows * group, ...]."""

    def __init__(self, problem: Problem, call: Call, slab: Slab, scratch: Scratch, once: bool) -> None:
        """once: there is one block of rows, so that each key is read once."""
        assert call.k is not None and call.v is not None
        self.problem, self.group, self.scratch = problem, slab.group, scratch
        self.scoring = Scoring(problem, call, slab, scratch)
        self.narrow, self.wide = working_dtype(problem), problem.lse_dtype
        self.q = scratch.pack("q", slab.of_queries(call.q), self.narrow)
        self.k = scratch.pack("k", slab.of_keys(call.k), self.narrow, once=once)
        self.v = scratch.pack("v", slab.of_keys(call.v), self.narrow, once=once)
        self.bounded = self._bounded(slab)
        self.sinks = None if call.sinks is None else slab.of_heads(call.sinks).to(self.wide)

    def _bounded(self, slab: Slab) -> bool:
        """True where no score can leave [-_BOUND, _BOUND] and rows see many keys."""
        middle = slab.q_len // 2
        keys = slab.mask.end(middle) - slab.mask.first(middle)
        if self.q.device.type != "cpu" or not self.scoring.plain or keys < _KEYS_WORTH_BOUNDING:
            return False
        longest = [float(torch.linalg.vector_norm(t, dim=-1).amax()) for t in (self.q, self.k)]
        return abs(factor(self.problem)) * longest[0] * longest[1] <= _BOUND

    def start(self, row: int, row_end: int) -> None:
        self.row = row
        self.block_q = self.scratch.block("block of q", self.q, row * self.group, (row_end - row) * self.group)
        shape = tuple(self.block_q.shape[:-1])
        self.m = self.scratch.zeros("m", (*shape, 1), self.wide)
        self.l = self.scratch.zeros("l", (*shape, 1), self.wide)
        self.o = self.scratch.zeros("o", (*shape, self.v.shape[-1]), self.wide)

    def see(self, tile: Tile) -> None:
        """Takes the keys and values of a tile into l and O."""
        first, count = (tile.row - self.row) * self.group, (tile.row_end - tile.row) * self.group
        m, l, o = (t.narrow(-2, first, count) for t in (self.m, self.l, self.o))
        q = self.scratch.block("rows of q", self.block_q, first, count)
        k = self.scratch.block("keys of k", self.k, tile.column, tile.column_end - tile.column)
        v = self.scratch.block("keys of v", self.v, tile.column, tile.column_end - tile.column)
        shape = (*q.shape[:-1], k.shape[-2])
        products = self.scratch.take("products", shape, self.narrow)
        scores = products if self.narrow == self.wide else self.scratch.take("scores", shape, self.wide)
        self._score(tile, product(products, q, k.mT, factor(self.problem)), scores)
        if not self.bounded:
            _follow(scores, m, l, o)
            scores.sub_(m)
        weights = scores.exp2_()
        l += weights.sum(-1, keepdim=True)
        if self.problem.dropout_p > 0:
            self.scoring.drop(tile, weights)
        if self.narrow != self.wide:
            weights = products.copy_(weights)
        self.scratch.add_product(o, weights, v)

    def _score(self, tile: Tile, products: Tensor, scores: Tensor) -> None:
        """Writes the scores of a tile, -inf where hidden, from its products; the two may be one tensor."""
        if self.scoring.plain:
            self.scoring.hide(tile, products, -torch.inf)
        if scores is not products:
            scores.copy_(products)
        if not self.scoring.plain:
            self.scoring.bend(scores)
            self.scoring.add(tile, scores)
            self.scoring.hide(tile, scores, -torch.inf)

    def finish(self) -> tuple[Tensor, Tensor]:
        """(out, lse) of the block."""
        lse = (self.m + torch.log2(self.l)) * math.log(2)
        out = self.o / self.l.masked_fill(self.l == 0, 1.0)
        if self.problem.dropout_p > 0:
            out *= 1 / (1 - self.problem.dropout_p) if self.problem.dropout_p < 1 else 0.0
        if self.sinks is None:
            return out, lse
        # A sink is one more key whose value is 0: it only enlarges the denominator.
        kv, group = self.sinks.shape[1], self.sinks.shape[3]
        total = torch.logaddexp(lse.view(-1, kv, lse.shape[-2] // group, group), self.sinks).view_as(lse)
        return out * torch.exp(lse - total.clamp(min=torch.finfo(total.dtype).min)), total


def _follow(scores: Tensor, m: Tensor, l: Tensor, o: Tensor) -> None:
    """Moves m of rows that saw nothing before or whose scores passed it, and all that is relative to m.

    The scores themselves are left: less the m of far-away ALiBi keys, those near by would lose their digits.
    """
    top = scores.amax(-1, keepdim=True) - m
    fresh = l == 0
    # A comparison on the host would wait for any other device.
    if scores.device.type == "cpu" and not bool(((top > _SLACK) | fresh).any()):
        return
    # A fresh row's m may fall, too; a row that still sees nothing keeps it.
    rise = torch.where(fresh, top, top.clamp(min=0.0)).masked_fill_(top == -torch.inf, 0.0)
    shrink = torch.exp2(-rise.masked_fill(fresh, 0.0))
    m += rise
    l *= shrink
    o *= shrink
