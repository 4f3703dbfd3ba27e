"""Readable attention: the dense standard form as a backend, and the published algorithms that compute the same.

The backend is `standard`: every feature, any device, float64 included, memory quadratic in sequence length. All other
backends are measured against it.
"""

from __future__ import annotations

from flashtile.problem import Problem
from flashtile.reference.standard import backward, forward

__all__ = ["backward", "forward", "supports"]


def supports(problem: Problem) -> str | None:
    """None: the reference serves every valid problem."""
    return None
