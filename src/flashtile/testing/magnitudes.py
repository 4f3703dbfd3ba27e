"""How much each element of a result would typically move if every intermediate value were off by a relative 1.

Roundings are taken as independent (Higham, "Accuracy and stability of numerical algorithms", section 2.8): the terms of
a sum and the sum itself add in quadrature. A softmax weight is uncertain by its score: scores of size A that are off by
a relative r move exp(score) by a relative A r. A small multiple of this, times the unit roundoff, is the error that any
sensible order of the sums may have, also where the exact result cancels to nothing and where there is a single term.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.testing import plain
from flashtile.testing.cases import Case
from flashtile.testing.inputs import Inputs


def magnitudes(case: Case, inputs: Inputs, rng: Tensor | None) -> dict[str, Tensor]:
    """Per name of a result (out, lse, dq, dk, dv, dbias, dsinks) a tensor of its shape; inputs are in float64."""
    squares = {name: torch.zeros_like(t) for name, t in gradient_inputs(inputs).items()}
    longest = (max((pair[side] for pair in case.lengths), default=0) for side in (0, 1))
    dscores_of_all = inputs.q.new_zeros(len(case.lengths), case.heads, *longest) if "dbias" in squares else None
    outs, lses = [], []
    for one in plain.sequences(case, inputs, rng):
        part = one.queries if case.varlen else one.batch
        weights, sink, spread = _weights_and_spread(case, inputs, one)
        if one.keep is not None:
            kept = plain.drop(torch.ones_like(weights), one.keep, case.dropout_p)
        else:
            kept = torch.ones_like(weights)
        values = weights * kept
        out, do = values @ one.v, inputs.dout[part].transpose(0, 1)
        out_square = spread * (out.square() + values.square() @ one.v.square())
        delta_square = (do.square() * out_square).sum(-1, keepdim=True) + (do * out).sum(-1, keepdim=True).square()
        if inputs.dlse is not None:
            dlse = inputs.dlse[:, part] if case.varlen else inputs.dlse[part]
            delta_square = delta_square + dlse.square()[..., None]
        products = (do @ one.v.transpose(-1, -2)).square() + do.square() @ one.v.square().transpose(-1, -2)
        dscores = spread * weights.square() * (kept.square() * products + delta_square)
        _add_gradients(case, squares, one, spread * values.square(), do, dscores)
        if dscores_of_all is not None:
            dscores_of_all[one.batch, :, : dscores.shape[1], : dscores.shape[2]] = dscores
        if inputs.sinks is not None:
            squares["dsinks"] += (sink.square() * spread * delta_square).sum((1, 2))
        outs.append(out_square.transpose(0, 1))
        lses.append(spread.squeeze(-1))
    if dscores_of_all is not None:
        squares["dbias"] = dscores_of_all.sum_to_size(squares["dbias"].shape)
    squares["out"], squares["lse"] = plain.joined(case, inputs, outs, lses)
    # Behind the last packed sequence lse is -inf; there its size is of no interest, but must not be NaN.
    return {name: square.abs().sqrt() for name, square in squares.items()}


def gradient_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that have gradients, by the gradient's name."""
    named = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v, "dbias": inputs.bias, "dsinks": inputs.sinks}
    return {name: t for name, t in named.items() if t is not None and t.is_floating_point()}


def _weights_and_spread(case: Case, inputs: Inputs, one: plain.Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax weights, the sink's weight, and per row 1 + the squares of its largest score and of lse."""
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
    return weights[..., :-1], weights[..., -1:], spread


def _add_gradients(
    case: Case, squares: dict[str, Tensor], one: plain.Sequence, weights: Tensor, do: Tensor, dscores: Tensor
) -> None:
    queries, keys = (one.queries, one.keys) if case.varlen else (one.batch, one.batch)
    dscores = plain.scale_of(case) ** 2 * dscores
    squares["dq"][queries] += (dscores @ one.k.square()).transpose(0, 1)
    dk, dv = dscores.transpose(-1, -2) @ one.q.square(), weights.transpose(-1, -2) @ do.square()
    for name, per_head in (("dk", dk), ("dv", dv)):
        heads = squares[name].shape[-2]
        grouped = per_head.reshape(heads, case.heads // heads, *per_head.shape[1:])
        squares[name][keys] += grouped.sum(1).transpose(0, 1)
