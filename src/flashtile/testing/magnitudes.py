"""How much each element of a result would typically move if intermediate values were off by a relative 1.

Two kinds: `computed` lets every step be off (it is multiplied by the unit roundoff of the computing dtype), `stored`
only what has to be held in the inputs' own dtype: the operands P and dS of the second products, and out, which delta =
rowsum(dout * out) is made of. Both matter where plain PyTorch is exact by luck, as in a softmax over one key.

Roundings are taken as independent (Higham, "Accuracy and stability of numerical algorithms", section 2.8), so the terms
of a sum add in quadrature. A softmax weight is uncertain by its score: scores of size A that are off by a relative r
move exp(score) by a relative A r.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.testing import plain
from flashtile.testing.cases import Case
from flashtile.testing.inputs import Inputs

Sizes = dict[str, Tensor]


class Pieces(NamedTuple):
    """Squares of what one sequence adds up, heads first."""

    dscores: Tensor  # [heads, q_len, k_len], terms of dS
    values: Tensor  # the same shape, weights after dropout
    sink: Tensor  # [heads, q_len, 1], terms of the sink's gradient
    out: Tensor  # [heads, q_len, v_dim]
    lse: Tensor  # [heads, q_len]


def magnitudes(case: Case, inputs: Inputs, rng: Tensor | None) -> tuple[Sizes, Sizes]:
    """(computed, stored): per name of a result (out, lse, dq, ...) a tensor of its shape; inputs are in float64."""
    totals = _Totals(case, inputs), _Totals(case, inputs)
    for one in plain.sequences(case, inputs, rng):
        for total, pieces in zip(totals, _pieces(case, inputs, one), strict=True):
            total.add(one, pieces)
    computed, stored = (total.finish() for total in totals)
    return computed, stored


def gradient_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that have gradients, by the gradient's name."""
    named = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v, "dbias": inputs.bias, "dsinks": inputs.sinks}
    return {name: t for name, t in named.items() if t is not None and t.is_floating_point()}


def _pieces(case: Case, inputs: Inputs, one: plain.Sequence) -> tuple[Pieces, Pieces]:
    part = one.queries if case.varlen else one.batch
    do = inputs.dout[part].transpose(0, 1)
    weights, sink, lse, spread = _softmax(case, inputs, one)
    kept = torch.ones_like(weights)
    if one.keep is not None:
        kept = plain.drop(kept, one.keep, case.dropout_p)
    values = weights * kept
    out, products = values @ one.v, do @ one.v.transpose(-1, -2)
    delta = (do * out).sum(-1, keepdim=True)
    out_terms = values.square() @ one.v.square()
    delta_terms = (do * out).square().sum(-1, keepdim=True)
    dlse = torch.zeros_like(delta)
    if inputs.dlse is not None:
        dlse = (inputs.dlse[:, part] if case.varlen else inputs.dlse[part])[..., None]
    product_terms = products.square() + do.square() @ one.v.square().transpose(-1, -2)
    uncertain_out = spread * (out.square() + out_terms)
    uncertain_delta = (do.square() * uncertain_out).sum(-1, keepdim=True) + delta.square() + dlse.square()
    computed = Pieces(
        dscores=spread * weights.square() * (kept.square() * product_terms + uncertain_delta),
        values=spread * values.square(),
        sink=sink.square() * spread * uncertain_delta,
        out=uncertain_out,
        lse=spread.squeeze(-1),
    )
    stored = Pieces(
        dscores=weights.square() * ((kept * products - delta + dlse).square() + delta_terms),
        values=values.square(),
        sink=sink.square() * delta_terms,
        out=out_terms,
        lse=torch.zeros_like(lse),
    )
    return computed, stored


def _softmax(case: Case, inputs: Inputs, one: plain.Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, the sink's weight, lse, and per row 1 + the squares of its largest score and of lse."""
    scores = plain.scores_of(case, one)
    squares = plain.scale_of(case) ** 2 * (
        (one.q @ one.k.transpose(-1, -2)).square() + one.q.square() @ one.k.square().transpose(-1, -2)
    )
    if one.added is not None:
        squares = squares + one.added.square()
    # One more column stands for the sink, hidden where there is none; it also gives an empty row something to reduce.
    column = scores.new_full((*scores.shape[:2], 1), -torch.inf)
    if inputs.sinks is not None:
        column = inputs.sinks[:, None, None].expand_as(column)
    scores, squares = torch.cat([scores, column], -1), torch.cat([squares, column.square()], -1)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, torch.inf))
    spread = 1 + squares.masked_fill(scores == -torch.inf, 0.0).amax(-1, keepdim=True)
    spread = spread + lse.masked_fill(lse == -torch.inf, 0.0).square()
    return weights[..., :-1], weights[..., -1:], lse.squeeze(-1), spread


class _Totals:
    """Adds the pieces of all sequences up to squares in the shapes of the results."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self.case, self.inputs = case, inputs
        self.outs: list[Tensor] = []
        self.lses: list[Tensor] = []
        self.squares = {name: torch.zeros_like(t) for name, t in gradient_inputs(inputs).items()}
        longest = (max((pair[side] for pair in case.lengths), default=0) for side in (0, 1))
        shape = (len(case.lengths), case.heads, *longest)
        self.dscores = inputs.q.new_zeros(shape) if "dbias" in self.squares else None

    def add(self, one: plain.Sequence, pieces: Pieces) -> None:
        self.outs.append(pieces.out.transpose(0, 1))
        self.lses.append(pieces.lse)
        queries, keys = (one.queries, one.keys) if self.case.varlen else (one.batch, one.batch)
        scaled = plain.scale_of(self.case) ** 2 * pieces.dscores
        self.squares["dq"][queries] += (scaled @ one.k.square()).transpose(0, 1)
        do = self.inputs.dout[queries].transpose(0, 1)
        dk, dv = scaled.transpose(-1, -2) @ one.q.square(), pieces.values.transpose(-1, -2) @ do.square()
        for name, per_head in (("dk", dk), ("dv", dv)):
            heads = self.squares[name].shape[-2]
            grouped = per_head.reshape(heads, self.case.heads // heads, *per_head.shape[1:])
            self.squares[name][keys] += grouped.sum(1).transpose(0, 1)
        if "dsinks" in self.squares:
            self.squares["dsinks"] += pieces.sink.sum((1, 2))
        if self.dscores is not None:
            q_len, k_len = pieces.dscores.shape[1:]
            self.dscores[one.batch, :, :q_len, :k_len] = pieces.dscores

    def finish(self) -> Sizes:
        if self.dscores is not None:
            self.squares["dbias"] = self.dscores.sum_to_size(self.squares["dbias"].shape)
        self.squares["out"], self.squares["lse"] = plain.joined(self.case, self.inputs, self.outs, self.lses)
        # Behind the last packed sequence lse is -inf; there its size is of no interest, but must not be NaN.
        return {name: square.abs().sqrt() for name, square in self.squares.items()}
