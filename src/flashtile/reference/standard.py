"""Standard attention, forward and backward, as the textbook writes it: the oracle of every other backend.

    S = score(Q K^T)      P = softmax(S)      O = dropout(P) V

    dV = dropout(P)^T dO          dP = dropout(dO V^T)
    delta = rowsum(dO * O) - dlse     dS = P * (dP - delta)
    dQ = scale * (dS * score') K      dK = scale * (dS * score')^T Q

(Dao et al. 2022, "FlashAttention", algorithm 0 and appendix B.) All of S and P is held at once. Half-precision inputs
are computed in float32, float64 ones in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.dropout import keep_mask
from flashtile.masks import Lowered, interval_rows
from flashtile.merge import sink_gradient
from flashtile.problem import Call, Problem


class Stretch(NamedTuple):
    """Sequences of equal lengths that are computed at once: the batch of a dense call, or one packed sequence."""

    batches: Tensor  # int64 [stretch], their places in the batch
    queries: slice | None  # their rows in packed tensors, None in dense ones
    keys: slice | None

    def of_queries(self, tensor: Tensor) -> Tensor:
        return tensor if self.queries is None else tensor[self.queries].unsqueeze(0)

    def of_keys(self, tensor: Tensor) -> Tensor:
        return tensor if self.keys is None else tensor[self.keys].unsqueeze(0)

    def of_lse(self, lse: Tensor) -> Tensor:
        return lse if self.queries is None else lse[:, self.queries].unsqueeze(0)

    def of_batches(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.shape[0] == 1 else tensor[self.batches]


def forward(problem: Problem, call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call, as the backend contract in docs/design.md says."""
    out = call.q.new_empty(problem.out_shape) if out is None else out
    lse = call.q.new_empty(problem.lse_shape, dtype=problem.lse_dtype)
    if problem.varlen:
        out.zero_()
        lse.fill_(-torch.inf)
    for part in _stretches(problem, call):
        scores, _ = _scores(problem, call, part)
        weights, part_lse = _softmax(scores, call.sinks)
        part.of_lse(lse).copy_(part_lse)
        weights = _dropout(problem, call, part, weights)
        _, v = _keys_values(problem, call, part)
        part.of_queries(out).copy_(_weigh(weights, v))
    return out, lse


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
    dq, dk, dv = grads
    dbias = None
    if bias_grad and call.bias is not None:
        dbias = torch.zeros(call.bias.shape, dtype=lse.dtype, device=lse.device)
    delta = _delta(problem, out, lse, dout, dlse)
    if problem.varlen:
        for grad in grads:
            grad.zero_()
    for part in _stretches(problem, call):
        scores, slope = _scores(problem, call, part)
        seen_nothing = part.of_lse(lse) == -torch.inf
        weights = torch.exp(scores - part.of_lse(lse).masked_fill(seen_nothing, torch.inf)[..., None])
        q, do = (_by_head(problem, part.of_queries(t)) for t in (call.q, dout))
        k, v = _keys_values(problem, call, part)
        dropped = _dropout(problem, call, part, weights)
        part.of_keys(dv).copy_(_weigh_transposed(dropped, do))
        dweights = _dropout(problem, call, part, (do @ v.transpose(-1, -2)).flatten(1, 2))
        # Hidden keys have weight 0; saying so here keeps what they hold, NaN even, out of the gradients.
        dscores = (weights * (dweights - part.of_lse(delta)[..., None])).masked_fill(scores == -torch.inf, 0.0)
        if dbias is not None:
            _add_reduced(dbias, dscores, part)
        dscores = problem.scale * (dscores if slope is None else dscores * slope)
        part.of_queries(dq).copy_(_weigh(dscores, k))
        part.of_keys(dk).copy_(_weigh_transposed(dscores, q))
    if dbias is not None and call.bias is not None:
        dbias = dbias.to(call.bias.dtype)
    return dbias, None if call.sinks is None else sink_gradient(call.sinks, lse, delta)


def _stretches(problem: Problem, call: Call) -> Iterator[Stretch]:
    batches = torch.arange(problem.batch, device=call.q.device)
    if not problem.varlen:
        yield Stretch(batches, None, None)
        return
    assert call.cu_seqlens_q is not None
    assert call.cu_seqlens_k is not None
    ends_q, ends_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for b in range(problem.batch):
        yield Stretch(batches[b : b + 1], slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1]))


def _by_head(problem: Problem, tensor: Tensor) -> Tensor:
    """(batch, rows, heads, dim) in the computing dtype as [batch, kv_heads, group or 1, rows, dim]."""
    batch, rows, heads, dim = tensor.shape
    by_head = tensor.to(problem.lse_dtype).transpose(1, 2)
    return by_head.reshape(batch, problem.kv_heads, heads // problem.kv_heads, rows, dim)


def _keys_values(problem: Problem, call: Call, part: Stretch) -> tuple[Tensor, Tensor]:
    assert call.k is not None
    assert call.v is not None
    return _by_head(problem, part.of_keys(call.k)), _by_head(problem, part.of_keys(call.v))


def _weigh(weights: Tensor, values: Tensor) -> Tensor:
    """[batch, heads, m, n] weights of [batch, kv_heads, 1, n, dim] values, as (batch, m, heads, dim)."""
    batch, heads, m, n = weights.shape
    kv_heads = values.shape[1]
    grouped = weights.reshape(batch, kv_heads, heads // kv_heads, m, n)
    return torch.matmul(grouped, values).flatten(1, 2).transpose(1, 2)


def _weigh_transposed(weights: Tensor, rows: Tensor) -> Tensor:
    """[batch, heads, m, n] weights of [batch, kv_heads, group, m, dim] rows, as (batch, n, kv_heads, dim).

    Summed over m and over the heads of a group.
    """
    batch, _, m, n = weights.shape
    grouped = weights.reshape(batch, *rows.shape[1:3], m, n)
    return torch.matmul(grouped.transpose(-1, -2), rows).sum(2).transpose(1, 2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and lse of each row; a row that sees nothing has weights 0 and lse -inf (its sink, where it has one)."""
    if sinks is not None:
        # The sink is one more column, whose weight is dropped again: it carries no value.
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    if scores.shape[-1] == 0:
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    exponentials = torch.exp(scores - top)
    total = exponentials.sum(-1, keepdim=True)
    weights = exponentials / total.masked_fill(total == 0, 1.0)
    return weights if sinks is None else weights[..., :-1], (top + torch.log(total)).squeeze(-1)


def _scores(problem: Problem, call: Call, part: Stretch) -> tuple[Tensor, Tensor | None]:
    """Scores [batch, heads, q_len, k_len], -inf where hidden, and their slope in scale * q.k where it is not 1."""
    q = _by_head(problem, part.of_queries(call.q))
    k, _ = _keys_values(problem, call, part)
    scores = problem.scale * torch.matmul(q, k.transpose(-1, -2)).flatten(1, 2)
    slope = None
    if problem.softcap > 0:
        bent = torch.tanh(scores / problem.softcap)
        scores, slope = problem.softcap * bent, 1 - bent * bent
    q_len, k_len = scores.shape[-2:]
    row = torch.arange(q_len, device=scores.device)[:, None]
    column = torch.arange(k_len, device=scores.device)
    if call.alibi_slopes is not None:
        slopes = call.alibi_slopes.to(scores.dtype)
        slopes = slopes[None] if slopes.ndim == 1 else part.of_batches(slopes)
        scores = scores - slopes[:, :, None, None] * (row + k_len - q_len - column).abs()
    if call.bias is not None:
        bias = part.of_batches(_four_dimensions(call.bias))[..., :q_len, :k_len]
        if bias.dtype == torch.bool:
            scores = scores.masked_fill(~bias, -torch.inf)
        else:
            scores = scores + bias.to(scores.dtype)
    return scores.masked_fill(~_seen(call, part, q_len, k_len), -torch.inf), slope


def _seen(call: Call, part: Stretch, q_len: int, k_len: int) -> Tensor:
    """Boolean [stretch or 1, 1, q_len, k_len]: the keys inside each row's interval."""
    lowered = Lowered(call.window_left, call.window_right)
    if call.lo is not None and call.hi is not None:
        lowered = Lowered(None, None, part.of_batches(call.lo), part.of_batches(call.hi))
    lo, hi = interval_rows(lowered, q_len, k_len, call.q.device)
    column = torch.arange(k_len, device=call.q.device)
    return ((column >= lo[..., None]) & (column < hi[..., None])).unsqueeze(1)


def _dropout(problem: Problem, call: Call, part: Stretch, weights: Tensor) -> Tensor:
    """Weights (or their gradients) with dropped elements 0 and kept ones divided by 1 - dropout_p."""
    if problem.dropout_p == 0:
        return weights
    assert call.rng is not None
    _, heads, q_len, k_len = weights.shape
    head, row, column = (torch.arange(n, device=weights.device) for n in (heads, q_len, k_len))
    batch_head = part.batches[:, None] * heads + head
    keep = keep_mask(call.rng, problem.dropout_p, batch_head[..., None, None], row[:, None], column)
    return (weights / (1 - problem.dropout_p)).masked_fill(~keep, 0.0)


def _delta(problem: Problem, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """rowsum(dout * out) - dlse in lse's shape; 0 for a row that sees nothing, so that none of its gradients is NaN."""
    rows = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).transpose(-1, -2)
    delta = rows if dlse is None else rows - dlse
    return delta.masked_fill(lse == -torch.inf, 0.0)


def _four_dimensions(bias: Tensor) -> Tensor:
    return bias[(None,) * (4 - bias.ndim)]


def _add_reduced(dbias: Tensor, dscores: Tensor, part: Stretch) -> None:
    """Adds the gradient of a stretch's scores to that of the bias, summed over the dimensions that bias broadcasts."""
    full = _four_dimensions(dbias)
    q_len, k_len = dscores.shape[-2:]
    summed = [axis for axis in (1, 2, 3) if full.shape[axis] == 1]
    if full.shape[0] == 1:
        summed.insert(0, 0)
    reduced = dscores.sum(summed, keepdim=True) if summed else dscores
    target = full if full.shape[0] == 1 else full[part.batches[0] : part.batches[-1] + 1]
    target[..., : min(q_len, full.shape[2]), : min(k_len, full.shape[3])] += reduced
