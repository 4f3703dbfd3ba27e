"""Tiled attention in plain PyTorch operations: every feature on any device that PyTorch has, tuned for CPUs.

FlashAttention-2's structure (Dao 2023, arXiv 2307.08691): an outer loop over blocks of query rows, an online softmax,
one division at the end, and a backward that recomputes the weights from lse. Memory is linear in sequence length.
"""

from __future__ import annotations

from flashtile.backends.blocked.backward import backward
from flashtile.backends.blocked.forward import forward
from flashtile.problem import Problem

__all__ = ["backward", "forward", "supports"]


def supports(problem: Problem) -> str | None:
    """None: plain PyTorch operations serve every valid problem."""
    return None
