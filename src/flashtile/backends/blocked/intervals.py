"""Which tiles a mask needs: the interval of columns that each row of a score matrix sees, and how to cut it in tiles.

Rows are query rows and columns keys, or, for the backward, the other way round: `transposed` swaps the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.masks import rows_seeing

# Tiles begin and end at multiples of this, whatever the mask: oneDNN compiles a kernel for each new shape.
GRID = 64


class Tile(NamedTuple):
    """Rows [row, row_end) by columns [column, column_end); partial where the mask hides some of it."""

    row: int
    row_end: int
    column: int
    column_end: int
    partial: bool


@dataclass(frozen=True)
class Band:
    """Row i sees columns from `left` before to `right` after i + columns - rows; None is unlimited."""

    rows: int
    columns: int
    left: int | None
    right: int | None

    def first(self, row: int) -> int:
        """The first column that a row sees."""
        if self.left is None:
            return 0
        return min(max(row + self.columns - self.rows - self.left, 0), self.columns)

    def end(self, row: int) -> int:
        """The column behind the last one that a row sees."""
        if self.right is None:
            return self.columns
        return min(max(row + self.columns - self.rows + self.right + 1, 0), self.columns)

    def transposed(self) -> Band:
        return Band(self.columns, self.rows, self.right, self.left)

    def likeness(self, tile: Tile) -> tuple[int, ...]:
        """Equal for tiles of which the mask hides the same elements: those on one diagonal."""
        return tile.row - tile.column, tile.row_end - tile.row, tile.column_end - tile.column

    def seen(self, tile: Tile, device: torch.device) -> Tensor:
        """Boolean [rows, columns] of a tile."""
        row = torch.arange(tile.row, tile.row_end, device=device)[:, None] + (self.columns - self.rows)
        column = torch.arange(tile.column, tile.column_end, device=device)
        lo = column[0] if self.left is None else row - self.left
        hi = column[-1] + 1 if self.right is None else row + self.right + 1
        return (column >= lo) & (column < hi)


class Table:
    """Row i sees columns [lo[i], hi[i]); both int64, non-decreasing and within the columns."""

    def __init__(self, lo: Tensor, hi: Tensor, columns: int) -> None:
        self.rows, self.columns = lo.shape[0], columns
        self._lo, self._hi = lo, hi
        self._first, self._end = lo.tolist(), hi.tolist()

    def first(self, row: int) -> int:
        """The first column that a row sees."""
        return self._first[row]

    def end(self, row: int) -> int:
        """The column behind the last one that a row sees."""
        return self._end[row]

    def transposed(self) -> Table:
        lo, hi = rows_seeing(self._lo[None], self._hi[None], self.columns)
        return Table(lo[0].long(), hi[0].long(), self.rows)

    def likeness(self, tile: Tile) -> tuple[int, ...]:
        """Equal for tiles of which the mask hides the same elements: none but the tile itself."""
        return tile

    def seen(self, tile: Tile, device: torch.device) -> Tensor:
        """Boolean [rows, columns] of a tile."""
        column = torch.arange(tile.column, tile.column_end, device=device)
        lo, hi = self._lo[tile.row : tile.row_end, None], self._hi[tile.row : tile.row_end, None]
        return (column >= lo) & (column < hi)


Intervals = Band | Table


def cover(intervals: Intervals, back: Intervals, row: int, row_end: int, size: int, edge: int) -> Iterator[Tile]:
    """The tiles of rows [row, row_end) in which the mask shows something, from left to right.

    Tiles that it shows completely have up to `size` columns. Those that it cuts have up to `edge` and only the rows
    that see one of these columns, which `back`, the transposed intervals, tell.
    """
    columns = intervals.columns
    begin, stop = intervals.first(row), intervals.end(row_end - 1)
    full, full_stop = _round_up(intervals.first(row_end - 1), columns), _round_down(intervals.end(row), columns)
    begin, stop = _round_down(begin, columns), _round_up(stop, columns)
    if full >= full_stop:
        full = full_stop = stop
    yield from _cut_edge(back, row, row_end, _pieces(begin, min(full, stop), edge))
    for column, column_end in _pieces(full, full_stop, size):
        yield Tile(row, row_end, column, column_end, False)
    yield from _cut_edge(back, row, row_end, _pieces(full_stop, stop, edge))


def _cut_edge(back: Intervals, row: int, row_end: int, pieces: Iterator[tuple[int, int]]) -> Iterator[Tile]:
    for column, column_end in pieces:
        first, end = max(row, back.first(column)), min(row_end, back.end(column_end - 1))
        if first < end:
            first -= (first - row) % GRID
            end = min(row_end, end + (row - end) % GRID)
            yield Tile(first, end, column, column_end, True)


def _pieces(begin: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """[begin, stop) in the fewest pieces of at most `size`, about equal and cut on the grid."""
    length = stop - begin
    if length <= 0:
        return
    count = -(-length // size)
    step = min(size, -(-length // count // GRID) * GRID) if count > 1 else length
    for start in range(begin, stop, step):
        yield start, min(start + step, stop)


def _round_down(column: int, columns: int) -> int:
    return column if column == columns else column // GRID * GRID


def _round_up(column: int, columns: int) -> int:
    return min(-(-column // GRID) * GRID, columns)
