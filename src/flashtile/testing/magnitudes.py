"""How much each element of a result could move if every intermediate value were off by a relative 1.

Each sum is taken over absolute values, and a softmax weight is uncertain by its score: scores of size A that are off by
a relative r move exp(score) by a relative A r. A small multiple of this, times the unit roundoff, bounds the error of
every sensible order of the sums (Higham, "Accuracy and stability of numerical algorithms", section 3.1), also where
the exact result cancels to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.testing import plain
from flashtile.testing.cases import Case
from flashtile.testing.inputs import Inputs


def magnitudes(case: Case, inputs: Inputs, rng: Tensor | None) -> dict[str, Tensor]:
    """Per name of a result (out, lse, dq, dk, dv, dbias, dsinks) a tensor of its shape; inputs are in float64."""
    sizes = {name: torch.zeros_like(t) for name, t in gradient_inputs(inputs).items()}
    longest = (max((pair[side] for pair in case.lengths), default=0) for side in (0, 1))
    dscores_of_all = inputs.q.new_zeros(len(case.lengths), case.heads, *longest) if "dbias" in sizes else None
    outs, lses = [], []
    for one in plain.sequences(case, inputs, rng):
        weights, spread = _weights_and_spread(case, inputs, one)
        kept = torch.ones_like(weights)
        kept = kept if one.keep is None else plain.drop(kept, one.keep, case.dropout_p)
        uncertain = weights * (1 + spread)
        outs.append(((uncertain * kept) @ one.v.abs()).transpose(0, 1))
        lses.append((1 + spread).squeeze(-1))
        part = one.queries if case.varlen else one.batch
        do = inputs.dout[part].transpose(0, 1).abs()
        delta = (do * ((weights * kept) @ one.v.abs())).sum(-1, keepdim=True)
        if inputs.dlse is not None:
            delta = delta + (inputs.dlse[:, part] if case.varlen else inputs.dlse[part]).abs()[..., None]
        dscores = uncertain * (kept * (do @ one.v.abs().transpose(-1, -2)) + delta)
        _add_gradients(case, sizes, one, uncertain * kept, do, dscores)
        if dscores_of_all is not None:
            dscores_of_all[one.batch, :, : dscores.shape[1], : dscores.shape[2]] = dscores
        if inputs.sinks is not None:
            sizes["dsinks"] += ((1 + spread) * delta).sum((1, 2))
    if dscores_of_all is not None:
        sizes["dbias"] = dscores_of_all.sum_to_size(sizes["dbias"].shape)
    sizes["out"], sizes["lse"] = plain.joined(case, inputs, outs, lses)
    return sizes


def gradient_inputs(inputs: Inputs) -> dict[str, Tensor]:
    """The inputs that have gradients, by the gradient's name."""
    named = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v, "dbias": inputs.bias, "dsinks": inputs.sinks}
    return {name: t for name, t in named.items() if t is not None and t.is_floating_point()}


def _weights_and_spread(case: Case, inputs: Inputs, one: plain.Sequence) -> tuple[Tensor, Tensor]:
    """Softmax weights, and per row the largest sum of absolute terms among the scores that it sees."""
    scores = plain.scores_of(case, one)
    terms = abs(plain.scale_of(case)) * one.q.abs() @ one.k.abs().transpose(-1, -2)
    if one.added is not None:
        terms = terms + one.added.abs()
    # One more column stands for the sink, hidden where there is none; it also gives an empty row something to reduce.
    column = scores.new_full((*scores.shape[:2], 1), -torch.inf)
    if inputs.sinks is not None:
        column = inputs.sinks[:, None, None].expand_as(column)
    scores, terms = torch.cat([scores, column], -1), torch.cat([terms, column.abs()], -1)
    spread = terms.masked_fill(scores == -torch.inf, 0.0).amax(-1, keepdim=True)
    lse = torch.logsumexp(scores, -1, keepdim=True)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, torch.inf))
    return weights[..., :-1], spread


def _add_gradients(
    case: Case, sizes: dict[str, Tensor], one: plain.Sequence, weights: Tensor, do: Tensor, dscores: Tensor
) -> None:
    queries, keys = (one.queries, one.keys) if case.varlen else (one.batch, one.batch)
    dscores = abs(plain.scale_of(case)) * dscores
    sizes["dq"][queries] += (dscores @ one.k.abs()).transpose(0, 1)
    dk, dv = dscores.transpose(-1, -2) @ one.q.abs(), weights.transpose(-1, -2) @ do
    for name, per_head in (("dk", dk), ("dv", dv)):
        heads = sizes[name].shape[-2]
        grouped = per_head.reshape(heads, case.heads // heads, *per_head.shape[1:])
        sizes[name][keys] += grouped.sum(1).transpose(0, 1)
