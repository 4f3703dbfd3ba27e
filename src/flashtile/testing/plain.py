"""Attention as plain PyTorch operations in the inputs' own dtype, differentiated by autograd: the yardstick.

It shares no code with the reference backend beyond the definitions of masks and of dropout: what the two agree on in
float64 is right, and what this loses in half precision is what a user of standard attention loses.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.dropout import keep_mask
from flashtile.testing.cases import Case
from flashtile.testing.inputs import Inputs


class Sequence(NamedTuple):
    """One entry of the batch: its tensors, heads first, keys and values repeated for each query head."""

    batch: int
    q: Tensor  # [heads, q_len, dim]
    k: Tensor  # [heads, k_len, dim]
    v: Tensor  # [heads, k_len, v_dim]
    hidden: Tensor  # bool, broadcasts to [heads, q_len, k_len]
    added: Tensor | None  # alibi and bias, broadcasts alike
    keep: Tensor | None  # bool, dropout
    queries: slice
    keys: slice


def attention(case: Case, inputs: Inputs, rng: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of the case; every step rounds to the dtype of the inputs, but for the softmax inside."""
    outs, lses = [], []
    for one in sequences(case, inputs, rng):
        scores = scores_of(case, one)
        if inputs.sinks is not None:
            column = inputs.sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, column], -1)
        blind = ~(scores != -torch.inf).any(-1, keepdim=True)
        scores = scores.masked_fill(blind, 0.0)
        weights = torch.softmax(scores, -1).masked_fill(blind, 0.0)[..., : one.k.shape[1]]
        if one.keep is not None:
            weights = drop(weights, one.keep, case.dropout_p)
        wide = scores.double() if scores.dtype == torch.float64 else scores.float()
        lse = torch.logsumexp(wide, -1) if wide.shape[-1] else wide.sum(-1)
        lses.append(lse.masked_fill(blind.squeeze(-1), -torch.inf))
        outs.append((weights @ one.v).transpose(0, 1))
    return joined(case, inputs, outs, lses)


def sequences(case: Case, inputs: Inputs, rng: Tensor | None) -> Iterator[Sequence]:
    """The entries of the batch, dense or packed, one by one."""
    start_q = start_k = 0
    for b, (q_len, k_len) in enumerate(case.lengths):
        queries, keys = slice(start_q, start_q + q_len), slice(start_k, start_k + k_len)
        if case.varlen:
            start_q, start_k = queries.stop, keys.stop
            q, k, v = inputs.q[queries], inputs.k[keys], inputs.v[keys]
        else:
            q, k, v = inputs.q[b], inputs.k[b], inputs.v[b]
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        group = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        hidden, added = _hidden_and_added(case, inputs, b, q_len, k_len)
        yield Sequence(b, q, k, v, hidden, added, _keep(case, q, b, k_len, rng), queries, keys)


def _hidden_and_added(case: Case, inputs: Inputs, b: int, q_len: int, k_len: int) -> tuple[Tensor, Tensor | None]:
    row = torch.arange(q_len, device=inputs.q.device)
    column = torch.arange(k_len, device=inputs.q.device)
    hidden = torch.zeros(1, q_len, k_len, dtype=torch.bool, device=inputs.q.device)
    if case.mask is not None:
        lo, hi = (
            bound.expand(len(case.lengths), -1)[b, :, None] for bound in case.mask.bounds(row[None], q_len, k_len)
        )
        hidden = hidden | (column < lo) | (column >= hi)
    added = None
    if inputs.alibi_slopes is not None:
        slopes = inputs.alibi_slopes if inputs.alibi_slopes.ndim == 1 else inputs.alibi_slopes[b]
        added = -slopes[:, None, None] * (row[:, None] + k_len - q_len - column).abs()
    if inputs.bias is not None:
        bias = inputs.bias[(None,) * (4 - inputs.bias.ndim)]
        bias = bias[b if bias.shape[0] > 1 else 0, :, :q_len, :k_len]
        if bias.dtype == torch.bool:
            hidden = hidden | ~bias
        else:
            added = bias if added is None else added + bias
    return hidden, added


def _keep(case: Case, q: Tensor, b: int, k_len: int, rng: Tensor | None) -> Tensor | None:
    if rng is None:
        return None
    heads, q_len, _ = q.shape
    head, row, column = (torch.arange(n, device=q.device) for n in (heads, q_len, k_len))
    return keep_mask(rng, case.dropout_p, (b * heads + head)[:, None, None], row[:, None], column)


def scale_of(case: Case) -> float:
    return case.dim**-0.5 if case.scale is None else case.scale


def scores_of(case: Case, one: Sequence) -> Tensor:
    """Scores [heads, q_len, k_len], -inf where hidden."""
    scores = one.q @ one.k.transpose(-1, -2) * scale_of(case)
    if case.softcap:
        scores = case.softcap * torch.tanh(scores / case.softcap)
    if one.added is not None:
        scores = scores + one.added.to(scores.dtype)
    return scores.masked_fill(one.hidden, -torch.inf)


def drop(weights: Tensor, keep: Tensor, dropout_p: float) -> Tensor:
    """Weights after dropout."""
    kept = weights.masked_fill(~keep, 0.0)
    return kept / (1 - dropout_p) if dropout_p < 1 else kept


def joined(case: Case, inputs: Inputs, outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Results per sequence in the shapes of the native call; rows behind the last packed sequence are 0 and -inf."""
    if case.varlen:
        out, lse = torch.cat(outs), torch.cat(lses, 1)
        missing = inputs.q.shape[0] - out.shape[0]
        pad = torch.nn.functional.pad
        return pad(out, (0, 0, 0, 0, 0, missing)), pad(lse, (0, missing), value=-torch.inf)
    if outs:
        return torch.stack(outs), torch.stack(lses)
    wide = torch.float64 if inputs.q.dtype == torch.float64 else torch.float32
    empty = inputs.dout + 0 * inputs.q.sum()
    return empty, empty[..., 0].transpose(1, 2).to(wide)
