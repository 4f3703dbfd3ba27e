"""Backward: for each block of keys, the tiles of rows that see it, their weights recomputed from lse.

    P = 2^(S - lse)     dV += P^T dO     dS = P * (dO V^T - delta)     dQ += dS K     dK += dS^T Q

with delta = rowsum(dO * O) - dlse (Dao 2023, algorithm 2). In bfloat16 dO V^T - delta comes out of the product itself,
through three more columns. dK and dV of a block stay while rows pass.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.backends.blocked import native
from flashtile.backends.blocked.configs import Config, pick_backward, working_dtype
from flashtile.backends.blocked.intervals import Tile, cover
from flashtile.backends.blocked.scores import (
    LOG2E,
    Scoring,
    Scratch,
    bias_tile,
    factor,
    lead,
    product,
    split,
)
from flashtile.backends.blocked.slabs import Slab, slabs
from flashtile.merge import sink_gradient
from flashtile.problem import Call, Problem


def backward(
    problem: Problem,
    call: Call,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    bias_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes dq, dk and dv and returns (dbias, dsinks), as the backend contract in docs/design.md says."""
    if dlse is None and native.serves(problem):
        native.backward(problem, call, out, lse, dout, grads)
        return None, None
    if problem.varlen:
        for grad in grads:
            grad.zero_()
    delta = torch.full_like(lse, 0.0)
    dbias = None
    if bias_grad and call.bias is not None:
        # Where nothing is broadcast, no element is added to twice.
        whole = problem.bias_shape == (problem.batch, problem.q_heads, problem.q_len, problem.k_len)
        dtype = call.bias.dtype if whole else problem.lse_dtype
        dbias = torch.zeros(call.bias.shape, dtype=dtype, device=lse.device)
    config, scratch = pick_backward(problem), Scratch(call.q)
    for slab in slabs(problem, call, config):
        part = _Keys(problem, call, slab, scratch, (out, lse, dout, dlse), delta)
        part.dbias = None if dbias is None else slab.of_bias(dbias)
        part.differentiate(config, grads)
    if dbias is not None and call.bias is not None:
        dbias = dbias.to(call.bias.dtype)
    return dbias, None if call.sinks is None else sink_gradient(call.sinks, lse, delta)


class _Rows(NamedTuple):
    """What a block of rows brings: [(units,) rows * group, ...]; lse is in units of log2."""

    q: Tensor
    do: Tensor
    do_delta: Tensor
    lse: Tensor
    delta: Tensor


class _Keys:
    """The keys and values of a slab and, one after the other, the tiles that see a block of them."""

    dbias: Tensor | None = None

    def __init__(
        self,
        problem: Problem,
        call: Call,
        slab: Slab,
        scratch: Scratch,
        saved: tuple[Tensor, Tensor, Tensor, Tensor | None],
        delta: Tensor,
    ) -> None:
        """saved: (out, lse, dout, dlse). delta, in lse's shape, is written."""
        assert call.k is not None and call.v is not None
        self.problem, self.slab, self.scratch = problem, slab, scratch
        self.scoring = Scoring(problem, call, slab, scratch)
        self.narrow, self.wide = working_dtype(problem), problem.lse_dtype
        # With dropout, delta is subtracted after elements were dropped, so the product cannot do it.
        self.fused = self.narrow != self.wide and self.scoring.plain and problem.dropout_p == 0
        q, k, v = slab.of_queries(call.q), slab.of_keys(call.k), slab.of_keys(call.v)
        own_delta = slab.of_lse(delta).copy_(self._delta(*saved))
        do, columns = slab.of_queries(saved[2]), split(-own_delta, self.narrow) if self.fused else ()
        pack = partial(scratch.pack, dtype=self.narrow)
        self.q, self.do, self.k = pack("q", q), pack("do", do), pack("k", k)
        self.v = pack("v", v, columns=(1.0,) * len(columns))
        self.do_delta = pack("do_delta", do, columns=columns) if self.fused else self.do
        # Where a row saw nothing, its weights must become 0, not NaN.
        lse = slab.of_lse(saved[1])
        lse = lse.masked_fill(lse == -torch.inf, torch.inf) * LOG2E
        self.lse, self.delta = (t.reshape(*lead(slab.units), -1, 1) for t in (lse, own_delta))

    def _delta(self, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
        """rowsum(dout * out) - dlse of the slab; 0 for a row that saw nothing, so that its gradients are 0."""
        slab, shape = self.slab, tuple(self.slab.of_queries(out).shape)
        product = self.scratch.take("out", shape, self.wide).copy_(slab.of_queries(out))
        product *= self.scratch.take("dout", shape, self.wide).copy_(slab.of_queries(dout))
        rows = product.sum(-1)
        delta = rows if dlse is None else rows - slab.of_lse(dlse)
        return delta.masked_fill(slab.of_lse(lse) == -torch.inf, 0.0)

    def differentiate(self, config: Config, grads: tuple[Tensor, Tensor, Tensor]) -> None:
        """Writes the slab's part of dq, dk and dv."""
        slab, problem = self.slab, self.problem
        dq, dk, dv = slab.of_queries(grads[0]), slab.of_keys(grads[1]), slab.of_keys(grads[2])
        self.dq = self.scratch.zeros("dq", tuple(self.q.shape), self.wide)
        seen_by = slab.mask.transposed()
        row_step = max(config.rows // slab.group, 1)
        for key in range(0, slab.k_len, config.keys):
            end = min(key + config.keys, slab.k_len)
            self.dk = self.scratch.zeros("dk", (*lead(slab.units), end - key, problem.qk_dim), self.wide)
            self.dv = self.scratch.zeros("dv", (*lead(slab.units), end - key, problem.v_dim), self.wide)
            for turned in cover(seen_by, slab.mask, key, end, row_step, max(config.edge // slab.group, 1)):
                self._see(_turn(turned), key)
            dk[:, :, key:end].copy_(self.dk.mul_(problem.scale).view_as(dk[:, :, key:end]))
            dv[:, :, key:end].copy_(self.dv.view_as(dv[:, :, key:end]))
        dq.copy_(self.dq.mul_(problem.scale).view_as(dq))

    def _see(self, tile: Tile, key: int) -> None:
        """Adds what one tile contributes to every gradient."""
        first, count = tile.row * self.slab.group, (tile.row_end - tile.row) * self.slab.group
        keys = tile.column_end - tile.column
        rows = _Rows(
            q=self.scratch.block("rows of q", self.q, first, count),
            do=self.scratch.block("rows of do", self.do, first, count),
            do_delta=self.scratch.block("rows of do_delta", self.do_delta, first, count),
            lse=self.lse.narrow(-2, first, count),
            delta=self.delta.narrow(-2, first, count),
        )
        k = self.scratch.block("keys of k", self.k, tile.column, keys)
        v = self.scratch.block("keys of v", self.v, tile.column, keys)
        weights, dscores = (self._fused if self.fused else self._general)(tile, rows, k, v)
        dk, dv = (t.narrow(-2, tile.column - key, keys) for t in (self.dk, self.dv))
        self.scratch.add_product(dv, weights.mT, rows.do)
        self.scratch.add_product(self.dq.narrow(-2, first, count), dscores, k)
        self.scratch.add_product(dk, dscores.mT, rows.q)

    def _fused(self, tile: Tile, rows: _Rows, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(P, dS) in the working dtype, delta subtracted by the product."""
        products = self._product("products", rows.q, k, factor(self.problem))
        wide = self.scratch.take("scores", tuple(products.shape), self.wide)
        wide.copy_(products).sub_(rows.lse).exp2_()
        weights = products.copy_(wide)
        dscores = self._product("dweights", rows.do_delta, v)
        for values in (weights, dscores):
            self.scoring.hide(tile, values, 0.0)
        return weights, dscores.mul_(weights)

    def _general(self, tile: Tile, rows: _Rows, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(dropped P, dS) in the working dtype, computed in the wide one with every feature."""
        problem, scoring = self.problem, self.scoring
        scores = self._widened("scores", self._product("products", rows.q, k, factor(problem)))
        scoring.bend(scores)
        slope = scoring.slope(scores)
        scoring.add(tile, scores)
        weights = scores.sub_(rows.lse).exp2_()
        dweights = self._widened("dscores", self._product("dweights", rows.do, v))
        kept = weights
        if problem.dropout_p > 0:
            keep = 1 / (1 - problem.dropout_p) if problem.dropout_p < 1 else 0.0
            kept = torch.mul(weights, keep, out=self.scratch.take("kept", tuple(weights.shape), self.wide))
            scoring.drop(tile, kept, dweights.mul_(keep))
        dscores = dweights.sub_(rows.delta).mul_(weights)
        for values in (kept, dscores):
            scoring.hide(tile, values, 0.0)
        self._add_bias_gradient(tile, dscores)
        if slope is not None:
            dscores *= slope
        return self._narrowed("products", kept), self._narrowed("dweights", dscores)

    def _product(self, name: str, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
        """alpha * left right^T."""
        shape = (*left.shape[:-1], right.shape[-2])
        return product(self.scratch.take(name, shape, self.narrow), left, right.mT, alpha)

    def _widened(self, name: str, values: Tensor) -> Tensor:
        if self.narrow == self.wide:
            return values
        return self.scratch.take(name, tuple(values.shape), self.wide).copy_(values)

    def _narrowed(self, name: str, values: Tensor) -> Tensor:
        if self.narrow == self.wide:
            return values
        return self.scratch.take(name, tuple(values.shape), self.narrow).copy_(values)

    def _add_bias_gradient(self, tile: Tile, dscores: Tensor) -> None:
        """Adds a tile's dS to the gradient of the bias, summed over the dimensions that the bias broadcasts."""
        if self.dbias is None:
            return
        target = bias_tile(self.dbias, tile)
        target += self.scoring.by_head(tile, dscores).sum_to_size(target.shape)


def _turn(tile: Tile) -> Tile:
    """A tile of the transposed scores as one of the scores."""
    return Tile(tile.column, tile.column_end, tile.row, tile.row_end, tile.partial)
