"""From a test's case to the problem that tables of tile sizes are asked about."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flashtile.problem import Problem
from flashtile.testing import Case


def problem_of(case: Case, like: Problem) -> Problem:
    """`like` with a case's lengths, heads, head dims, mask and order; the mask is one of distances, or none."""
    distances = (None, None) if case.mask is None else case.mask.distances()
    assert distances is not None
    heads = {"q_heads": case.heads, "kv_heads": case.kv_heads or case.heads}
    dims = {"qk_dim": case.dim, "v_dim": case.v_dim or case.dim}
    lengths: dict[str, Any] = {"batch": case.batch, "q_len": case.q_len, "k_len": case.k_len}
    if case.q_lens is not None and case.k_lens is not None:
        lengths = {"batch": len(case.q_lens), "q_len": max(case.q_lens), "k_len": max(case.k_lens), "varlen": True}
    left, right = distances
    return replace(
        like, **heads, **dims, **lengths, window_left=left, window_right=right, deterministic=case.deterministic
    )
