"""Calls of flash_attn_with_kvcache by kind, and what they must give: each sequence alone, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import alibi, band, standard
from torch import Tensor

CAPACITY, HEADS, KV_HEADS, DIM = 12, 4, 2, 8
LENGTHS = (5, 0, 9)  # one sequence is empty before the call
POSITIONS = 20


@dataclass(frozen=True)
class Kind:
    """A kind of call. page: tokens a page. layout: how a contiguous cache lies in memory. rotated: elements turned."""

    queries: int = 2
    new: int = 0
    rotated: int = 0
    page: int = 0
    layout: str = "contiguous"
    chosen_rows: bool = False
    leftpad: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | int | None = LENGTHS
    options: dict[str, Any] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "plain": Kind(),
    "one-query": Kind(queries=1, options={"causal": True}),
    "full-cache": Kind(lengths=None),
    "number-of-tokens": Kind(lengths=7, options={"causal": True}),
    "more-queries-than-tokens": Kind(queries=7, options={"causal": True}),
    "heads-first-memory": Kind(layout="heads-first", options={"causal": True}),
    "part-of-a-buffer": Kind(layout="part", options={"causal": True}),
    "strides-that-do-not-divide": Kind(layout="ragged", new=1),
    "rows": Kind(chosen_rows=True, options={"causal": True}),
    "leftpad": Kind(leftpad=(2, 0, 9), options={"causal": True}),
    "leftpad-rows": Kind(leftpad=(2, 0, 3), chosen_rows=True),
    "leftpad-paged": Kind(leftpad=(4, 0, 1), page=3, options={"causal": True}),
    "pages-of-1": Kind(page=1),
    "pages-of-3": Kind(page=3, options={"causal": True}),
    "pages-of-4": Kind(page=4, queries=1),
    "pages-of-256": Kind(page=256, options={"causal": True}),
    "append-1": Kind(queries=1, new=1, options={"causal": True}),
    "append-3": Kind(queries=3, new=3, options={"causal": True}),
    "append-less-than-queries": Kind(queries=4, new=2, options={"causal": True}),
    "append-heads-first-memory": Kind(new=2, layout="heads-first", options={"causal": True}),
    "append-rows": Kind(new=3, chosen_rows=True),
    "append-pages": Kind(new=3, page=2, options={"causal": True}),
    "append-leftpad": Kind(new=2, leftpad=(5, 0, 4), options={"causal": True}),
    "rotary": Kind(queries=3, new=3, rotated=8, options={"causal": True}),
    "rotary-halves": Kind(queries=3, new=3, rotated=8, options={"causal": True, "rotary_interleaved": False}),
    "rotary-part-of-the-head": Kind(queries=2, new=2, rotated=4, options={"causal": True}),
    "rotary-all-queries-at-one-place": Kind(queries=3, new=3, rotated=8),
    "rotary-window": Kind(queries=3, new=2, rotated=8, options={"window_size": (3, 1)}),
    "rotary-window-wider-than-the-cache": Kind(queries=3, new=2, rotated=8, options={"window_size": (CAPACITY, -1)}),
    "rotary-pages-leftpad": Kind(queries=2, new=2, rotated=6, page=3, leftpad=(1, 0, 2), options={"causal": True}),
    "rotary-rows": Kind(queries=1, new=1, rotated=8, chosen_rows=True, options={"rotary_interleaved": False}),
    "window": Kind(queries=3, options={"window_size": (3, 0)}),
    "window-tensor": Kind(queries=3, options={"window_size": torch.tensor([2, 1])}),
    "scale-softcap": Kind(options={"softmax_scale": 0.7, "softcap": 2.0}),
    "alibi": Kind(options={"alibi_slopes": torch.tensor([0.1, 0.3, 0.5, 0.7]), "causal": True}),
    "alibi-batch": Kind(leftpad=(1, 0, 2), options={"alibi_slopes": torch.arange(12.0).view(3, 4) / 12}),
    "alibi-batch-pages": Kind(page=4, options={"alibi_slopes": torch.arange(12.0).view(3, 4) / 12, "causal": True}),
    "splits": Kind(options={"num_splits": 3, "causal": True}),
}


class Setting:
    """The tensors of a kind of call: caches full of NaN but for the tokens held, and where each token lies."""

    def __init__(self, kind: Kind, dtype: torch.dtype) -> None:
        self.kind, batch = kind, len(LENGTHS)
        held = kind.lengths
        self.lengths = [CAPACITY] * batch if held is None else [held] * batch if isinstance(held, int) else list(held)
        self.tokens = torch.randn(2, batch, CAPACITY, KV_HEADS, DIM, dtype=dtype)
        self.q = torch.randn(batch, kind.queries, HEADS, DIM, dtype=dtype)
        self.new = torch.randn(2, batch, kind.new, KV_HEADS, DIM, dtype=dtype)
        angles = torch.rand(POSITIONS, kind.rotated // 2, dtype=torch.float64) * 6
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        self.table: Tensor | None = None
        self.rows: Tensor | None = None
        if kind.page:
            per_sequence = -(-CAPACITY // kind.page)
            order = torch.randperm(batch * per_sequence + 2)
            self.table = order[: batch * per_sequence].view(batch, per_sequence).int()
            shape = (len(order), kind.page)
        else:
            self.rows = torch.tensor([3, 0, 2], dtype=torch.int32) if kind.chosen_rows else None
            shape = (4 if kind.chosen_rows else batch, CAPACITY)
        self.caches = [memory(kind.layout, (*shape, KV_HEADS, DIM), dtype) for _ in range(2)]
        for cache, tokens in zip(self.caches, self.tokens, strict=True):
            for b, length in enumerate(self.lengths):
                for position in range(length):
                    cache[self.place(b, position)] = tokens[b, position]

    def place(self, b: int, position: int) -> tuple[int, int]:
        """Where a token lies in a cache's first two dimensions."""
        if self.table is not None:
            page, offset = divmod(position, self.kind.page)
            return int(self.table[b, page]), offset
        return (b if self.rows is None else int(self.rows[b])), position

    def arguments(self) -> dict[str, Any]:
        kind = self.kind
        found: dict[str, Any] = dict(q=self.q, k_cache=self.caches[0], v_cache=self.caches[1], **kind.options)
        tensor = isinstance(kind.lengths, tuple)
        found["cache_seqlens"] = torch.tensor(kind.lengths, dtype=torch.int32) if tensor else kind.lengths
        found["cache_batch_idx"], found["block_table"] = self.rows, self.table
        if kind.leftpad is not None:
            found["cache_leftpad"] = torch.tensor(kind.leftpad, dtype=torch.int32)
        if kind.new:
            found["k"], found["v"] = self.new
        if kind.rotated:
            found["rotary_cos"], found["rotary_sin"] = self.cos, self.sin
        return found


def memory(layout: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory full of NaN whose strides are those of a kind of cache."""
    a, b, c, d = shape
    if layout == "heads-first":
        return torch.full((a, c, b, d), torch.nan, dtype=dtype).transpose(1, 2)
    if layout == "part":
        return torch.full((a, b + 5, c + 1, d), torch.nan, dtype=dtype)[:, 2 : b + 2, :c]
    if layout == "ragged":
        return torch.full((a, b * c * d + 3), torch.nan, dtype=dtype)[:, : b * c * d].unflatten(1, (b, c, d))
    return torch.full(shape, torch.nan, dtype=dtype)


def turned(x: Tensor, position: int, setting: Setting) -> Tensor:
    """One token's heads (heads, dim), each pair a complex number times cos + i sin."""
    rotated = setting.kind.rotated
    if not rotated:
        return x
    head = x[..., :rotated].double()
    halves = not setting.kind.options.get("rotary_interleaved", True)
    pairs = head.unflatten(-1, (2, -1)).transpose(-1, -2) if halves else head.unflatten(-1, (-1, 2))
    factor = torch.complex(setting.cos[position].double(), setting.sin[position].double())
    product = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * factor)
    product = product.transpose(-1, -2).flatten(-2) if halves else product.flatten(-2)
    return torch.cat([product.to(x.dtype), x[..., rotated:]], -1)


def expected(setting: Setting) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(out, lse, caches after the call), one sequence after the other in float64."""
    kind, outs, lses = setting.kind, [], []
    caches = [cache.clone() for cache in setting.caches]
    options = dict(kind.options)
    left, right = (int(side) for side in options.pop("window_size", (-1, -1)))
    right = 0 if options.pop("causal", False) else right
    bounded = 0 <= left < CAPACITY or 0 <= right < CAPACITY
    slopes = options.pop("alibi_slopes", None)
    for b, length in enumerate(setting.lengths):
        k, v = (list(tokens[b, :length]) for tokens in setting.tokens)
        for i in range(kind.new):
            k.append(turned(setting.new[0, b, i], length + i, setting))
            v.append(setting.new[1, b, i])
            caches[0][setting.place(b, length + i)] = k[-1]
            caches[1][setting.place(b, length + i)] = v[-1]
        q = [turned(setting.q[b, i], length + (i if bounded else 0), setting) for i in range(kind.queries)]
        first = 0 if kind.leftpad is None else min(kind.leftpad[b], len(k))
        out, lse = alone(
            q,
            k[first:],
            v[first:],
            (left, right),
            slopes[b] if slopes is not None and slopes.ndim == 2 else slopes,
            options,
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses), caches


def alone(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    window: tuple[int, int],
    slopes: Tensor | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """(out, lse) of one sequence with its own tokens; +inf for a query that sees none."""
    if not k:
        return torch.zeros(1, len(q), HEADS, DIM).double(), torch.full((1, HEADS, len(q)), torch.inf).double()
    stacked = (torch.stack(tokens)[None].double() for tokens in (q, k, v))
    left, right = (None if side < 0 else side for side in window)
    added = None if slopes is None else alibi(slopes.double(), len(q), len(k))
    out, lse = standard(
        *stacked, seen=band(len(q), len(k), left, right), added=added,
        scale=options.get("softmax_scale"), softcap=options.get("softcap", 0.0),
    )  # fmt: skip
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)
