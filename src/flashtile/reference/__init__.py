"""Readable attention: the dense standard form as a backend, and the published algorithms that compute the same.

The backend is `standard`: every feature, any device, float64 included, memory quadratic in sequence length. All other
backends are measured against it.

The algorithms take one head, compute in the dtype of their inputs and count their slow-memory traffic: `textbook`
(standard attention in three steps), `softmax` (safe, and split in parts), `flash1`, `flash2` and `flash2_backward`;
`traffic` has the closed forms of the counts. docs/tutorial.md walks through them.
"""

from __future__ import annotations

from flashtile.problem import Problem
from flashtile.reference.standard import backward, forward

__all__ = ["backward", "forward", "supports"]


def supports(problem: Problem) -> str | None:
    """None: the reference serves every valid problem."""
    return None
