"""Compiles kernels for a GPU that is not there and prints, a JSON line a kernel, what the binary needs.

Run as a script, in a process of its own: which Triton compiles is decided by PYTHONPATH, and the interpreter that the
other tests use must be off.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from flashtile.problem import Problem

CAPABILITY = {"sm_80": (8, 0), "sm_90": (9, 0), "gfx942": None}


def problems(target: str, dim: int, few: bool) -> Iterator[Problem]:
    """Every kind of row in the tables of tile sizes for one head dim; `few` leaves the two ends of the list."""
    plain = Problem(
        batch=2, q_len=8192, k_len=8192, q_heads=16, kv_heads=4, qk_dim=dim, v_dim=dim, dtype=torch.bfloat16,
        device="cuda", capability=CAPABILITY[target], window_right=0, scale=dim**-0.5,
    )  # fmt: skip
    bias = {"bias": "additive", "bias_shape": (2, 16, 8192, 8192)}
    everything = replace(
        plain, window_left=1000, softcap=30.0, alibi=True, sinks=True, dropout_p=0.1, kv_heads=16, **bias
    )
    yield plain
    yield everything
    if few:
        return
    yield replace(everything, dtype=torch.float32, bias_shape=(1, 16, 8192, 8192))
    if target == "sm_90":
        yield replace(plain, dropout_p=0.1)
        yield replace(plain, softcap=30.0)
        yield replace(plain, **bias)
        yield replace(plain, varlen=True, total_q=9000, total_k=9000, window_left=100)


def main(target: str, dim: str, few: str) -> None:
    from flashtile.backends.triton import compile as binaries

    for problem in problems(target, int(dim), few == "few"):
        for kernel, needs in binaries.resources(problem, target).items():
            print(json.dumps({"kernel": kernel, "problem": str(problem), **needs._asdict()}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
