"""Masks as row intervals: query row i sees the keys [lo(i), hi(i)).

Both bounds are non-decreasing in i. Causal, sliding-window, prefix, chunked and packed-document masks are all of this
family, and so is the intersection of any two of them, `a & b`. Which tiles are empty, partial or full, and which query
rows see a key (for the backward), follow from the bounds alone, so a new mask needs no kernel.

Rows and keys are aligned at the end: row i stands at key position i + k_len - q_len (bottom-right alignment, as in
FlashAttention 2.1 and later).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Length = int | Tensor


class Lowered(NamedTuple):
    """A mask in the form that kernels read: diagonal distances, or a table of one interval per row.

    left, right: keys seen before and after the row's own position; None is unlimited.
    lo, hi: int32, (1 or batch, q_len), contiguous; when present they hold the whole mask and left, right are None.
    """

    left: int | None = None
    right: int | None = None
    lo: Tensor | None = None
    hi: Tensor | None = None


UNMASKED = Lowered()


@dataclass(frozen=True)
class Mask:
    """Base of all masks; combine two with `&`."""

    def distances(self) -> tuple[int | None, int | None] | None:
        """(left, right) where the mask is a band around the diagonal, None where only a table can say it."""
        return None

    def bounds(self, row: Tensor, q_len: Length, k_len: Length) -> tuple[Tensor, Tensor]:
        """Unclamped (lo, hi) for int64 rows; q_len and k_len are ints or tensors that broadcast with row."""
        raise NotImplementedError

    def __and__(self, other: Mask) -> Mask:
        return Both(self, other) if isinstance(other, Mask) else NotImplemented


@dataclass(frozen=True)
class Window(Mask):
    """Row i sees keys from `left` before to `right` after its position, both inclusive; None is unlimited."""

    left: int | None = None
    right: int | None = None

    def __post_init__(self) -> None:
        for name, side in (("left", self.left), ("right", self.right)):
            if side is not None:
                _check_int(f"Window {name}", side)

    def distances(self) -> tuple[int | None, int | None]:
        return self.left, self.right

    def bounds(self, row: Tensor, q_len: Length, k_len: Length) -> tuple[Tensor, Tensor]:
        position = row + (k_len - q_len)
        lo = torch.zeros_like(position) if self.left is None else position - self.left
        hi = torch.zeros_like(position) + k_len if self.right is None else position + self.right + 1
        return lo, hi


@dataclass(frozen=True)
class Full(Window):
    """Every row sees every key."""


@dataclass(frozen=True)
class Causal(Window):
    """Row i sees the keys up to its own position."""

    right: int | None = 0


@dataclass(frozen=True)
class Prefix(Mask):
    """Prefix-LM: the first `length` keys are seen by every row, the later ones causally."""

    length: int

    def __post_init__(self) -> None:
        _check_int("Prefix length", self.length, 0)

    def bounds(self, row: Tensor, q_len: Length, k_len: Length) -> tuple[Tensor, Tensor]:
        position = row + (k_len - q_len)
        return torch.zeros_like(position), (position + 1).clamp(min=self.length)


@dataclass(frozen=True)
class Chunked(Mask):
    """Positions are cut in chunks of `size`; a row sees its own chunk and `overlap` keys on either side of it."""

    size: int
    overlap: int = 0

    def __post_init__(self) -> None:
        _check_int("Chunked size", self.size, 1)
        _check_int("Chunked overlap", self.overlap, 0)

    def bounds(self, row: Tensor, q_len: Length, k_len: Length) -> tuple[Tensor, Tensor]:
        start = (row + (k_len - q_len)).div(self.size, rounding_mode="floor") * self.size
        return start - self.overlap, start + self.size + self.overlap


@dataclass(frozen=True)
class Documents(Mask):
    """Packed documents of the given lengths, end to end; a row sees its own document only."""

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.lengths, (tuple, list)):
            raise TypeError(f"Documents lengths: got {type(self.lengths).__name__}, expected a tuple of ints")
        for length in self.lengths:
            _check_int("Documents lengths", length, 0)

    def bounds(self, row: Tensor, q_len: Length, k_len: Length) -> tuple[Tensor, Tensor]:
        position = row + (k_len - q_len)
        ends = torch.tensor(self.lengths, device=row.device, dtype=torch.int64).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends])
        document = torch.searchsorted(ends, position.contiguous(), right=True)
        last = len(self.lengths)
        # A row before the first key is in no document: its end stays at 0, and so before the first document's.
        end = starts[(document + 1).clamp(max=last)].masked_fill(position < 0, 0)
        return starts[document.clamp(max=last)], end


@dataclass(frozen=True, eq=False)
class Intervals(Mask):
    """The family itself: lo and hi per row, integer, (q_len,) or (batch, q_len), non-decreasing along rows.

    The order is checked here, once (on a GPU that waits for the device; build the mask outside the hot loop).
    """

    lo: Tensor
    hi: Tensor

    def __post_init__(self) -> None:
        for name, table in (("lo", self.lo), ("hi", self.hi)):
            if not isinstance(table, Tensor) or table.dtype not in (torch.int32, torch.int64):
                got = table.dtype if isinstance(table, Tensor) else type(table).__name__
                raise TypeError(f"Intervals {name}: got {got}, expected an int32 or int64 tensor")
            if table.ndim not in (1, 2):
                raise ValueError(f"Intervals {name}: got {table.ndim} dimensions, expected (q_len,) or (batch, q_len)")
            if bool((table.diff(dim=-1) < 0).any()):
                raise ValueError(f"Intervals {name}: got a bound that decreases along rows, expected non-decreasing")
        if self.lo.shape != self.hi.shape:
            raise ValueError(f"Intervals hi: got shape {tuple(self.hi.shape)}, expected {tuple(self.lo.shape)} as lo")

    def bounds(self, row: Tensor, q_len: Length, k_len: Length) -> tuple[Tensor, Tensor]:
        if self.lo.shape[-1] != row.shape[-1]:
            raise ValueError(f"mask: got intervals for {self.lo.shape[-1]} rows, expected {row.shape[-1]}")
        return self.lo.to(row.device, torch.int64), self.hi.to(row.device, torch.int64)


@dataclass(frozen=True)
class Both(Mask):
    """Intersection: (max lo, min hi)."""

    first: Mask
    second: Mask

    def distances(self) -> tuple[int | None, int | None] | None:
        a, b = self.first.distances(), self.second.distances()
        if a is None or b is None:
            return None
        return _tighter(a[0], b[0]), _tighter(a[1], b[1])

    def bounds(self, row: Tensor, q_len: Length, k_len: Length) -> tuple[Tensor, Tensor]:
        lo_a, hi_a = self.first.bounds(row, q_len, k_len)
        lo_b, hi_b = self.second.bounds(row, q_len, k_len)
        return torch.maximum(lo_a, lo_b), torch.minimum(hi_a, hi_b)


def _check_int(name: str, value: object, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: got {type(value).__name__}, expected an int")
    if least is not None and value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")


def _tighter(a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return min(a, b)


def lower(mask: Mask, q_len: int, k_len: int, device: torch.device | str = "cpu") -> Lowered:
    """The mask of a dense call as kernels read it."""
    distances = mask.distances()
    if distances is not None:
        return Lowered(*distances)
    return Lowered(None, None, *_table(mask, q_len, q_len, k_len, device))


def lower_varlen(mask: Mask, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int) -> Lowered:
    """The mask of a packed-sequences call: a table has one row of intervals per sequence."""
    distances = mask.distances()
    if distances is not None:
        return Lowered(*distances)
    q_lens = cu_seqlens_q.diff().to(torch.int64)[:, None]
    k_lens = cu_seqlens_k.diff().to(torch.int64)[:, None]
    return Lowered(None, None, *_table(mask, max_seqlen_q, q_lens, k_lens, cu_seqlens_q.device))


def _table(mask: Mask, rows: int, q_len: Length, k_len: Length, device: torch.device | str) -> tuple[Tensor, Tensor]:
    row = torch.arange(rows, device=device, dtype=torch.int64)[None, :]
    lo, hi = mask.bounds(row, q_len, k_len)
    limit = torch.zeros_like(row) + k_len  # [1 or batch, q_len]
    lo, hi = torch.broadcast_tensors(torch.minimum(lo.clamp(min=0), limit), torch.minimum(hi.clamp(min=0), limit))
    # Rows past a short sequence's end repeat the last bound, so that both stay non-decreasing.
    return lo.cummax(-1).values.to(torch.int32).contiguous(), hi.cummax(-1).values.to(torch.int32).contiguous()


def interval_rows(
    lowered: Lowered, q_len: int, k_len: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Clamped int64 (lo, hi) of every row, (1 or batch, q_len), whatever the lowered form."""
    if lowered.lo is not None and lowered.hi is not None:
        return lowered.lo[:, :q_len].long().clamp(max=k_len), lowered.hi[:, :q_len].long().clamp(max=k_len)
    row = torch.arange(q_len, device=device, dtype=torch.int64)[None, :]
    lo, hi = Window(lowered.left, lowered.right).bounds(row, q_len, k_len)
    return lo.clamp(0, k_len), hi.clamp(0, k_len)


def rows_seeing(lo: Tensor, hi: Tensor, k_len: int) -> tuple[Tensor, Tensor]:
    """The transposed mask: key j is seen by the rows [first(j), end(j)); int32, (1 or batch, k_len).

    first(j) counts the rows with hi <= j, end(j) those with lo <= j: both bounds are non-decreasing, so the rows that
    see a key are a suffix cut by a prefix. Where first >= end nobody sees the key.
    """
    keys = torch.arange(k_len, device=lo.device, dtype=lo.dtype).expand(lo.shape[0], -1).contiguous()
    first = torch.searchsorted(hi.contiguous(), keys, right=True)
    end = torch.searchsorted(lo.contiguous(), keys, right=True)
    return first.to(torch.int32), end.to(torch.int32)
