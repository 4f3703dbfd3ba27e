"""What the gradient of an additive bias is made of: dS summed over the axes along which the bias was broadcast.

How it is made depends on the bias alone (`kind`):

    "tile"    one value per (batch, head, query, key)
    "row"     one value per query row
    "column"  one value per key
    "summed"  one value per (query, key) for several batches or heads
"""

import torch
from torch import Tensor

from flashtile.problem import Call, Problem


def kind(problem: Problem) -> str:
    """Which of the four ways makes the gradient of this problem's bias."""
    assert problem.bias_shape is not None
    batch, heads, rows, columns = problem.bias_shape
    if columns == 1 and problem.k_len > 1:
        return "row"
    if rows == 1 and problem.q_len > 1:
        return "column"
    return "tile" if (batch, heads) == (problem.batch, problem.q_heads) else "summed"


def allocate(problem: Problem, call: Call, kind: str) -> Tensor | None:
    """The memory that the two passes fill: dbias itself ("tile", "summed"), or float32 sums per row or column."""
    if kind == "none":
        return None
    bias = call.bias
    assert bias is not None
    if kind in ("row", "column"):
        length = problem.q_len if kind == "row" else problem.k_len
        return torch.zeros(problem.batch, problem.q_heads, length, dtype=torch.float32, device=bias.device)
    # Tiles that no row sees are never visited, and their gradient is 0.
    return torch.zeros_like(bias, memory_format=torch.contiguous_format)


def finish_sums(problem: Problem, call: Call, kind: str, sums: Tensor) -> Tensor:
    """dbias in the bias's own shape and dtype from sums per row, per column or per (query, key)."""
    bias = call.bias
    assert bias is not None
    if kind in ("row", "column"):
        sums = sums[..., None] if kind == "row" else sums[:, :, None, :]
    if sums.numel() == 2 * bias.numel():
        # A sum of two is rounded once in any dtype, and PyTorch's reduction of them takes several times as long.
        axis = next(axis for axis in (0, 1) if sums.shape[axis] != problem.bias_shape[axis])  # type: ignore[index]
        sums = sums.narrow(axis, 0, 1) + sums.narrow(axis, 1, 1)
    return sums.sum_to_size(problem.bias_shape).to(bias.dtype).reshape(bias.shape)  # type: ignore[arg-type]
