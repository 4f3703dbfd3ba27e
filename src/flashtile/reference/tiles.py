"""What every readable algorithm says about one head: its scale, its masked scores, its tiles, its dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.dropout import keep_mask
from flashtile.masks import Mask
from flashtile.problem import default_scale
from flashtile.reference.traffic import Shape, interval_of_rows


class Head:
    """Queries Q (N, d) and keys K (M, d) of one head. tau: the scale. lo, hi: the keys [lo, hi) that each row sees."""

    def __init__(self, Q: Tensor, K: Tensor, scale: float | None, mask: Mask | None) -> None:
        self.tau = default_scale(Q.shape[1]) if scale is None else scale
        shape = Shape(len(Q), len(K), Q.shape[1], 0, 1, 1, mask)
        self.lo, self.hi = interval_of_rows(shape, Q.device)

    def scores(self, Q_i: Tensor, K_j: Tensor, row: int, column: int) -> Tensor:
        """S_ij = MASK(tau Q_i K_j^T) of a tile that starts at (row, column): -inf where a key is hidden."""
        columns = torch.arange(column, column + len(K_j), device=K_j.device)
        lo, hi = (bound[row : row + len(Q_i), None] for bound in (self.lo, self.hi))
        return (self.tau * Q_i @ K_j.T).masked_fill((columns < lo) | (columns >= hi), -torch.inf)


def slices(length: int, block: int) -> list[slice]:
    """Consecutive tiles of `block` rows; the last may be shorter."""
    return [slice(start, min(start + block, length)) for start in range(0, length, block)]


def dropped(P: Tensor, p_drop: float, rng: Tensor | None, rows: slice, columns: slice) -> Tensor:
    """P * Z of a tile: Z is 0 with probability p_drop and 1 / (1 - p_drop) else, recomputed from rng, never stored."""
    if rng is None or p_drop == 0:
        return P
    row = torch.arange(rows.start, rows.stop, device=P.device)[:, None]
    column = torch.arange(columns.start, columns.stop, device=P.device)
    keep = keep_mask(rng, p_drop, torch.zeros_like(row), row, column)
    return (P / (1 - p_drop)).masked_fill(~keep, 0.0)
