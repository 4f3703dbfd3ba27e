"""The scores of one tile: products, softcap, ALiBi, bias, mask and dropout, for forward and backward alike.

Scores are in units of log2: 2^x runs four times as fast as e^x on the measured CPU. Forward and backward round them
alike, since a weight recomputed from a score that was rounded otherwise would not fit its lse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashtile.backends.blocked.intervals import Intervals, Tile
from flashtile.backends.blocked.slabs import Slab
from flashtile.dropout import keep_tile
from flashtile.problem import Call, Problem

LOG2E = math.log2(math.e)

# Three bfloat16 numbers hold the 24 bits of a float32 one.
SPLIT = 3

BitMasks = tuple[Tensor, Tensor | None]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# The tiles on a diagonal are hidden alike, and a mask has few diagonals; a table's tiles are all different.
_KEPT_TILES = 16


class Scratch:
    """Buffers that tiles and slabs share, by name: fresh memory costs a page fault every few kilobytes."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}
        self._hidden: dict[tuple[Intervals, tuple[int, ...], float, torch.dtype], BitMasks] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous uninitialised tensor; the one taken before under this name ends."""
        count = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name] = self._like.new_empty(count, dtype=dtype)
        return buffer[:count].view(shape)

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.take(name, shape, dtype).zero_()

    def pack(
        self, name: str, rows: Tensor, dtype: torch.dtype, columns: tuple[Tensor | float, ...] = (), once: bool = False
    ) -> Tensor:
        """A view [batch, kv, ..., dim] as [(units,) rows, dim + columns], contiguous, in the working dtype.

        once: it is read once only, which does not pay for a copy where the view will do.
        """
        units, dim = rows.shape[0] * rows.shape[1], rows.shape[-1]
        if once and rows.ndim == 4 and rows.dtype == dtype and 1 in rows.shape[:2]:
            return rows.flatten(0, 1) if units > 1 else rows[0, 0]
        packed = self.take(name, (*rows.shape[:-1], dim + len(columns)), dtype)
        packed[..., :dim] = rows
        for index, column in enumerate(columns):
            packed[..., dim + index] = column
        return packed.view(*lead(units), -1, dim + len(columns))

    def block(self, name: str, matrices: Tensor, first: int, count: int) -> Tensor:
        """Rows of [(units,) rows, dim], contiguous in bfloat16: oneDNN would copy them itself, and transposed."""
        rows = matrices.narrow(-2, first, count)
        if rows.is_contiguous() or rows.dtype != torch.bfloat16:
            return rows
        return self.take(name, tuple(rows.shape), rows.dtype).copy_(rows)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """total += left right. An addition of mixed dtypes would allocate memory for a widened copy."""
        part = product(self.take("part", tuple(total.shape), left.dtype), left, right)
        if part.dtype != total.dtype:
            part = self.take("widened part", tuple(total.shape), total.dtype).copy_(part)
        total += part

    def hidden(self, mask: Intervals, tile: Tile, fill: float, dtype: torch.dtype) -> BitMasks:
        """(kept, filled) of a tile that a mask cuts, see `_bit_masks`."""
        key = (mask, mask.likeness(tile), fill, dtype)
        if key not in self._hidden:
            if len(self._hidden) >= _KEPT_TILES:
                self._hidden.clear()
            self._hidden[key] = _bit_masks(mask.seen(tile, self._like.device), fill, dtype)
        return self._hidden[key]


def _bit_masks(seen: Tensor, fill: float, dtype: torch.dtype) -> BitMasks:
    """(kept, filled): value & kept | filled is the value where it is seen and fill elsewhere, NaN or not; None is 0."""
    bits = _BITS[dtype.itemsize]
    kept = seen.to(bits).neg_()  # all bits where seen, none where hidden
    if fill == 0:
        return kept, None
    return kept, kept.bitwise_not() & int(torch.tensor(fill, dtype=dtype).view(bits))


def factor(problem: Problem) -> float:
    """What the product q.k is multiplied by before anything else happens to it."""
    if problem.softcap == 0:
        return problem.scale * LOG2E
    return problem.scale / problem.softcap * (2 * LOG2E if _coarse(problem) else 1.0)


def _coarse(problem: Problem) -> bool:
    """True where an absolute error of 2^-24 in a hyperbolic tangent is far below the roundings of the scores."""
    return problem.dtype in (torch.float16, torch.bfloat16)


@dataclass
class Scoring:
    """What turns products into scores in the tiles of one slab."""

    problem: Problem
    call: Call
    slab: Slab
    scratch: Scratch

    def __post_init__(self) -> None:
        call, slab, wide = self.call, self.slab, self.problem.lse_dtype
        self.bias = None if call.bias is None else slab.of_bias(call.bias)
        slopes = call.alibi_slopes
        self.slopes = None if slopes is None else (slab.of_heads(slopes).to(wide) * LOG2E)[..., None]

    def by_head(self, tile: Tile, scores: Tensor) -> Tensor:
        """[(units,) rows * group, keys] as a view [batch, kv, rows, group, keys]."""
        slab = self.slab
        shape = (slab.batch.stop - slab.batch.start, -1, tile.row_end - tile.row, slab.group, scores.shape[-1])
        return scores.view(shape)

    @property
    def plain(self) -> bool:
        """True where a score is the product itself, -inf where hidden."""
        additive = self.bias is not None and self.bias.dtype != torch.bool
        return self.problem.softcap == 0 and self.slopes is None and not additive

    def bend(self, products: Tensor) -> None:
        """Products times `factor` become scores, softcapped, in place."""
        if self.problem.softcap == 0:
            return
        cap = self.problem.softcap * LOG2E
        if _coarse(self.problem):  # tanh(x) = 1 - 2 / (1 + e^2x), five times as fast
            products.exp2_().add_(1).reciprocal_().mul_(-2 * cap).add_(cap)
        else:
            products.tanh_().mul_(cap)

    def slope(self, scores: Tensor) -> Tensor | None:
        """The derivative of `bend` at softcapped scores, 1 - tanh^2; None where it is 1."""
        if self.problem.softcap == 0:
            return None
        slope = self.scratch.take("slope", tuple(scores.shape), scores.dtype)
        return torch.mul(scores, 1 / (self.problem.softcap * LOG2E), out=slope).square_().neg_().add_(1)

    def add(self, tile: Tile, scores: Tensor) -> None:
        """Adds ALiBi and additive bias to the scores of a tile, in place."""
        view = self.by_head(tile, scores)
        if self.slopes is not None:
            row = torch.arange(tile.row, tile.row_end, device=scores.device)
            column = torch.arange(tile.column, tile.column_end, device=scores.device)
            distance = (row[:, None] + (self.slab.k_len - self.slab.q_len) - column).abs().to(scores.dtype)
            view.addcmul_(self.slopes, distance[:, None], value=-1)
        if self.bias is not None and self.bias.dtype != torch.bool:
            bias = bias_tile(self.bias, tile)
            if bias.dtype != scores.dtype:
                bias = self.scratch.take("bias", tuple(bias.shape), scores.dtype).copy_(bias)
            view.add_(bias, alpha=LOG2E)

    def hide(self, tile: Tile, values: Tensor, fill: float) -> None:
        """Sets hidden elements, in place, to 0 or -inf, whatever they hold.

        On the bits: PyTorch's masked fill runs at 0.6 elements a nanosecond on the measured CPU, these at 50.
        """
        masks = []
        if tile.partial:
            kept, filled = self.scratch.hidden(self.slab.mask, tile, fill, values.dtype)
            masks.append((kept[:, None], None if filled is None else filled[:, None]))
        if self.bias is not None and self.bias.dtype == torch.bool:
            masks.append(_bit_masks(bias_tile(self.bias, tile), fill, values.dtype))
        view = self.by_head(tile, values).view(_BITS[values.element_size()])
        for kept, filled in masks:
            view.bitwise_and_(kept)
            if filled is not None:
                view.bitwise_or_(filled)

    def drop(self, tile: Tile, *values: Tensor) -> None:
        """Zeroes what dropout drops, in place in each of `values`; the factor of what it keeps is the caller's."""
        slab, problem, device = self.slab, self.problem, values[0].device
        assert self.call.rng is not None
        batch = torch.arange(slab.batch.start, slab.batch.stop, device=device)[:, None]
        head = torch.arange(slab.heads.start, slab.heads.stop, device=device)
        batch_head = (batch * problem.q_heads + head).unflatten(1, (-1, slab.group))  # [batch, kv, group]
        keep = keep_tile(
            self.call.rng, problem.dropout_p, batch_head, (tile.row, tile.row_end), (tile.column, tile.column_end)
        )
        kept = keep.transpose(2, 3).to(_BITS[values[0].element_size()]).neg_()
        for value in values:
            self.by_head(tile, value).view(kept.dtype).bitwise_and_(kept)


def lead(units: int) -> tuple[int, ...]:
    """The leading dimensions of a slab's matrices: none for one unit.

    oneDNN runs a product of two matrices a quarter faster than a batch of one, and half the indexing falls away.
    """
    return () if units == 1 else (units,)


def product(result: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
    """alpha * left right of matrices or batches of them, written to result."""
    if alpha == 0:  # oneDNN would leave the result as it is
        return result.zero_()
    if alpha == 1:
        return (torch.mm if left.ndim == 2 else torch.bmm)(left, right, out=result)
    add = torch.addmm if left.ndim == 2 else torch.baddbmm
    return add(result, left, right, beta=0, alpha=alpha, out=result)


def bias_tile(bias: Tensor, tile: Tile) -> Tensor:
    """A tile of a bias [batch | 1, kv | 1, q_len | 1, group | 1, k_len | 1]."""
    if bias.shape[2] > 1:
        bias = bias[:, :, tile.row : tile.row_end]
    if bias.shape[4] > 1:
        bias = bias[..., tile.column : tile.column_end]
    return bias


def split(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """SPLIT tensors of dtype whose sum, taken exactly, is the values."""
    parts = []
    for _ in range(SPLIT):
        parts.append(values.to(dtype))
        values = values - parts[-1].to(values.dtype)
    return tuple(parts)
