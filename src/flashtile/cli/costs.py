"""Floating-point operations and bytes of a workload: the one place where a speed's numerator is counted."""

from __future__ import annotations

import torch

from flashtile.cli.workload import Workload

MODES = ("forward", "backward", "train")


def visible_pairs(work: Workload) -> float:
    """Query-key pairs of one head that the mask leaves, summed over the batch.

    Causal attention over equal lengths counts as one half of q_len * k_len, as the FlashAttention papers do
    (Dao 2023, section 4.1), not as n (n + 1) / 2; every other mask is counted pair by pair.
    """
    if work.padding is None and work.lengths is None:
        return work.batch * _pairs(work, 0)
    if work.padding is None:
        per_length = {length: index for index, length in enumerate(work.lengths or ())}
        return sum(_pairs(work, per_length[length]) for length in work.lengths or ())
    return sum(_pairs(work, batch) for batch in range(work.batch))


def _pairs(work: Workload, batch: int) -> float:
    q_len, k_len = work.shape_of(batch)
    if work.causal and work.window is None and work.padding is None and q_len == k_len:
        return q_len * k_len / 2
    lo, hi = work.intervals(batch)
    return int((hi - lo).clamp(min=0).sum())


def flops(work: Workload, mode: str) -> float:
    """Floating-point operations of a workload in a mode: forward, backward, or train for both."""
    return products(visible_pairs(work) * work.heads, work.qk_dim, work.v_dim, mode)


def products(pairs: float, qk_dim: int, v_dim: int, mode: str) -> float:
    """Floating-point operations of the matrix products over query-key pairs, a multiply-add counted as two.

    Forward: S = Q K^T and O = P V, together 4 B H Nq Nk D where all pairs are visible. Backward: S again, dP, dQ, dK
    and dV, 2.5 times the forward where both head dims are equal. train: the sum.
    """
    forward = 2 * pairs * (qk_dim + v_dim)
    backward = 2 * pairs * (3 * qk_dim + 2 * v_dim)
    return {"forward": forward, "backward": backward, "train": forward + backward}[mode]


def compulsory_bytes(work: Workload, dtype: torch.dtype, mode: str) -> int:
    """Bytes that a workload must at least read and write; see `smallest_traffic`."""
    sizes = {name: _product(shape) for name, shape in work.tensor_shapes().items()}
    bias = 0 if work.bias is None else _product(work.bias)
    moved = smallest_traffic(sizes, work.v_dim, dtype, mode, bias)
    learned = bias * dtype.itemsize if work.bias_grad and mode != "forward" else 0
    return moved + learned


def smallest_traffic(sizes: dict[str, int], v_dim: int, dtype: torch.dtype, mode: str, bias: int = 0) -> int:
    """Bytes of every input and result of the mode, each moved once; sizes: elements of q, k, v and out.

    Forward: reads q, k, v and bias, writes out and lse. Backward: reads these inputs, out, lse and dout, writes dq, dk
    and dv. train: the sum.
    """
    inputs = sizes["q"] + sizes["k"] + sizes["v"]
    lse = sizes["out"] // v_dim * (8 if dtype == torch.float64 else 4)
    forward = (inputs + bias + sizes["out"]) * dtype.itemsize + lse
    backward = (2 * inputs + bias + 2 * sizes["out"]) * dtype.itemsize + lse
    return {"forward": forward, "backward": backward, "train": forward + backward}[mode]


def score_bytes(work: Workload, dtype: torch.dtype) -> int:
    """Bytes of one full score matrix over all heads, which only attention that stores it needs."""
    if work.lengths is not None:
        return work.heads * work.total**2 * dtype.itemsize
    return work.batch * work.heads * work.q_len * work.k_len * dtype.itemsize


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count
