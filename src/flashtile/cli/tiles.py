"""How a mask cuts the score matrix into tiles: counts of skipped, partial and full ones, and a picture of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SKIPPED, PARTIAL, FULL = range(3)
LETTERS = ".PF"


@dataclass(frozen=True)
class Tiling:
    """Tiles of block_m query rows and block_n keys under a mask; lo, hi: int64 [q_len], the keys that each row sees.

    A tile is full where all its rows see all its keys, skipped where the interval from its first row's first key to
    its last row's last key misses it, and partial else: what a kernel can know from two rows.
    """

    lo: Tensor
    hi: Tensor
    k_len: int
    block_m: int
    block_n: int

    def rows_of_tiles(self) -> tuple[Tensor, Tensor]:
        """(first, last) row of each row of tiles."""
        first = torch.arange(0, len(self.lo), self.block_m)
        return first, (first + self.block_m - 1).clamp(max=len(self.lo) - 1)

    def ranges(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For each row of tiles: key tiles [start, end) are visited, of them [full_start, full_end) are full."""
        first, last = self.rows_of_tiles()
        start, end = self.lo[first] // self.block_n, -(-self.hi[last] // self.block_n)
        end = torch.where(self.hi[last] > self.lo[first], end, start)
        # The last tile may be cut short by the end of the keys; it is full if its rows see all that is there.
        columns = -(-self.k_len // self.block_n)
        reach = torch.where(self.hi[first] >= self.k_len, columns, self.hi[first] // self.block_n)
        full_start = -(-self.lo[last] // self.block_n)
        full_end = torch.maximum(torch.minimum(reach, end), full_start)
        full_end = torch.where(full_start >= end, full_start, full_end)
        return start, end, full_start, full_end

    def counts(self) -> dict[str, int]:
        """Tiles of one head by kind."""
        start, end, full_start, full_end = self.ranges()
        total = len(start) * -(-self.k_len // self.block_n)
        visited, full = int((end - start).sum()), int((full_end - full_start).sum())
        return {"total": total, "skipped": total - visited, "partial": visited - full, "full": full}

    def picture(self, most_rows: int = 32, most_columns: int = 32) -> list[str]:
        """A letter for each tile or block of tiles: `.` all skipped, `F` all full, `P` some partial or mixed."""
        start, end, full_start, full_end = self.ranges()
        columns = -(-self.k_len // self.block_n)
        step_m, step_n = -(-len(start) // most_rows), -(-columns // most_columns)
        lines = []
        for row in range(0, len(start), step_m):
            of_rows = slice(row, row + step_m)
            line = ""
            for column in range(0, columns, step_n):
                stop = min(column + step_n, columns)
                seen = (start[of_rows] < stop) & (end[of_rows] > column)
                full = (full_start[of_rows] <= column) & (full_end[of_rows] >= stop)
                line += LETTERS[FULL if bool(full.all()) else PARTIAL if bool(seen.any()) else SKIPPED]
            lines.append(line)
        return lines
