"""A call cut into slabs: a few (batch entry, key-value head) pairs of equal lengths that one batched product serves.

Query heads that share a key-value head become rows of one matrix, row i of head g at i * group + g, so that grouped
queries never expand keys or values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flashtile.backends.blocked.configs import Config
from flashtile.backends.blocked.intervals import Band, Intervals, Table
from flashtile.problem import Call, Problem
from flashtile.validation import check_cu_seqlens_values


@dataclass(frozen=True)
class Slab:
    """Entries `batch` by key-value heads `kv`, each with q_len rows and k_len keys.

    queries, keys: the rows of a packed sequence, None in dense calls.
    """

    batch: slice
    kv: slice
    group: int
    q_len: int
    k_len: int
    mask: Intervals
    queries: slice | None = None
    keys: slice | None = None

    @property
    def units(self) -> int:
        return (self.batch.stop - self.batch.start) * (self.kv.stop - self.kv.start)

    @property
    def heads(self) -> slice:
        return slice(self.kv.start * self.group, self.kv.stop * self.group)

    def of_queries(self, tensor: Tensor) -> Tensor:
        """(batch, q_len, heads, dim) or (total_q, heads, dim) as a view [batch, kv, q_len, group, dim]."""
        rows = tensor[self.batch] if self.queries is None else tensor[self.queries].unsqueeze(0)
        return rows[:, :, self.heads].unflatten(2, (-1, self.group)).transpose(1, 2)

    def of_keys(self, tensor: Tensor) -> Tensor:
        """(batch, k_len, kv_heads, dim) or (total_k, kv_heads, dim) as a view [batch, kv, k_len, dim]."""
        rows = tensor[self.batch] if self.keys is None else tensor[self.keys].unsqueeze(0)
        return rows[:, :, self.kv].transpose(1, 2)

    def of_lse(self, lse: Tensor) -> Tensor:
        """(batch, heads, q_len) or (heads, total_q) as a view [batch, kv, q_len, group]."""
        rows = lse[self.batch] if self.queries is None else lse[:, self.queries].unsqueeze(0)
        return rows[:, self.heads].unflatten(1, (-1, self.group)).transpose(2, 3)

    def of_bias(self, bias: Tensor) -> Tensor:
        """A broadcastable bias as a view [batch | 1, kv | 1, q_len | 1, group | 1, k_len | 1]."""
        four = bias[(None,) * (4 - bias.ndim)]
        part = four if four.shape[0] == 1 else four[self.batch]
        part = part[:, None] if part.shape[1] == 1 else part[:, self.heads].unflatten(1, (-1, self.group))
        return part[:, :, :, : self.q_len, : self.k_len].transpose(2, 3)

    def of_heads(self, tensor: Tensor) -> Tensor:
        """(heads,) or (batch, heads) as a view [batch | 1, kv, 1, group]."""
        part = tensor[None] if tensor.ndim == 1 else tensor[self.batch]
        return part[:, self.heads].unflatten(1, (-1, self.group)).unsqueeze(2)


def slabs(problem: Problem, call: Call, config: Config) -> Iterator[Slab]:
    """All slabs of a call with something to compute, of `config.units` pairs or more where the lengths are short."""
    for batch, queries, key_rows, q_len, k_len in _sequences(problem, call):
        if q_len == 0:
            continue
        mask = _mask(call, batch, q_len, k_len)
        tile = min(config.rows, q_len * problem.group) * min(config.keys, max(k_len, 1))
        units = config.units * (config.rows * config.keys // tile)
        heads = min(units, problem.kv_heads)
        entries = max(units // problem.kv_heads, 1)
        for first in range(batch.start, batch.stop, entries):
            for head in range(0, problem.kv_heads, heads):
                part = slice(first, min(first + entries, batch.stop))
                kv = slice(head, min(head + heads, problem.kv_heads))
                yield Slab(part, kv, problem.group, q_len, k_len, mask, queries, key_rows)


def _sequences(problem: Problem, call: Call) -> Iterator[tuple[slice, slice | None, slice | None, int, int]]:
    """Runs of batch entries of one length and one mask, with their rows in packed tensors."""
    if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
        step = 1 if call.lo is not None and call.lo.shape[0] > 1 else problem.batch
        for b in range(0, problem.batch, step):
            yield slice(b, b + step), None, None, problem.q_len, problem.k_len
        return
    if problem.device != "cpu":
        check_cu_seqlens_values("cu_seqlens_q", call.cu_seqlens_q, problem.total_q, problem.q_len)
        check_cu_seqlens_values("cu_seqlens_k", call.cu_seqlens_k, problem.total_k, problem.k_len)
    ends_q, ends_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for b in range(problem.batch):
        queries, keys = slice(ends_q[b], ends_q[b + 1]), slice(ends_k[b], ends_k[b + 1])
        yield slice(b, b + 1), queries, keys, queries.stop - queries.start, keys.stop - keys.start


def _mask(call: Call, batch: slice, q_len: int, k_len: int) -> Intervals:
    if call.lo is None or call.hi is None:
        return Band(q_len, k_len, call.window_left, call.window_right)
    entry = batch.start if call.lo.shape[0] > 1 else 0
    lo, hi = (table[entry, :q_len].to(torch.int64).clamp(0, k_len) for table in (call.lo, call.hi))
    return Table(lo, hi, k_len)
