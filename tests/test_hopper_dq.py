"""How dQ comes about in the backward on Hopper: who clears it, who stores and who adds, in which order tiles start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from places import on_hopper

from flashtile.backends.hopper import backward_configs, backward_pass
from flashtile.problem import Problem
from flashtile.testing import Case, run_case

PLAIN = Problem(
    batch=2, q_len=4096, k_len=4096, q_heads=16, kv_heads=4, qk_dim=128, v_dim=128, dtype=torch.bfloat16,
    device="cuda", capability=(9, 0), scale=128**-0.5,
)  # fmt: skip


def test_counters_of_both_launches_are_cleared() -> None:
    """Each launch takes its items from one of its own; those of blocks of dQ come behind."""
    problem = replace(PLAIN, qk_dim=192, v_dim=128, deterministic=True)
    rows, accumulated, counters, _ = backward_pass._scratch(problem, torch.empty(0, device="meta"))
    assert accumulated.numel() == rows.shape[1] * 192
    assert counters.numel() == 2 + rows.shape[1] // 64


@pytest.mark.parametrize(
    ("changes", "cleared"),
    [
        ({"q_len": 4097}, False),
        ({"q_len": 4098}, True),
        ({"q_len": 2048, "qk_dim": 192}, False),
        ({"q_len": 2049, "qk_dim": 192}, True),
        ({"q_len": 2048, "qk_dim": 64}, False),
        ({"q_len": 2048, "qk_dim": 64, "v_dim": 64}, True),
        ({"q_len": 1024, "window_right": None}, False),
        ({"q_len": 1024, "k_len": 900, "window_right": None}, True),
        ({"q_len": 1024, "k_len": 2048, "window_right": None}, True),
        ({"q_len": 1024, "window_right": None, "qk_dim": 80, "v_dim": 72, "softcap": 5.0, "sinks": True}, False),
        ({"q_len": 8192, "window_right": None}, True),
        ({"q_len": 1024, "window_right": None, "alibi": True}, True),
        ({"q_len": 1024, "window_right": None, "dropout_p": 0.1}, True),
        ({"q_len": 1024, "window_right": None, "bias": "additive", "bias_shape": (1, 16, 1024, 1024)}, True),
        ({"q_len": 1024, "window_right": None, "qk_dim": 256}, True),
        ({"q_len": 1024, "window_right": None, "table": True}, True),
        ({"q_len": 1024, "k_len": 1000}, False),
        ({"q_len": 1024, "k_len": 1025}, True),
        ({"q_len": 10**6, "deterministic": True}, False),
        ({"q_len": 1024, "window_right": None, "deterministic": True}, False),
        ({"q_len": 1024, "qk_dim": 64, "v_dim": 64, "deterministic": True}, True),
        ({"q_len": 1024, "qk_dim": 64, "v_dim": 64, "window_left": 9, "deterministic": True}, False),
        ({"q_len": 10**6, "window_left": 2048}, False),
        ({"q_len": 10**6, "window_left": 2000, "window_right": 100}, True),
        ({"q_len": 10**6, "window_left": 100, "window_right": None}, True),
        ({"q_len": 4096, "varlen": True, "total_q": 9, "total_k": 9}, False),
        ({"q_len": 5000, "varlen": True, "total_q": 9, "total_k": 9}, True),
    ],
)
def test_the_first_tile_stores_dq_where_it_is_known_or_walks_are_short(changes: dict[str, Any], cleared: bool) -> None:
    problem = replace(PLAIN, **{"window_right": 0, "k_len": changes["q_len"], **changes})
    assert backward_configs.cleared(problem) == cleared
    rows, _, counters, _ = backward_pass._scratch(problem, torch.empty(0, device="meta"))
    counted = problem.deterministic or not cleared
    assert counters.numel() == 2 + (rows.shape[1] // 64 if counted else 0)


@pytest.mark.parametrize(
    ("changes", "heads"),
    [
        ({}, 1),
        ({"window_right": 0, "kv_heads": 16}, 4),
        ({"window_right": 0, "q_len": 8192}, 2),
        ({"window_right": 0, "q_len": 8192, "k_len": 8192, "qk_dim": 64, "v_dim": 64}, 4),
        ({"window_right": 0, "kv_heads": 16, "q_len": 8192, "k_len": 8192, "qk_dim": 256, "v_dim": 256}, 1),
        ({"window_right": 0, "kv_heads": 16, "q_len": 16384, "k_len": 16384}, 1),
        ({"window_right": 0, "kv_heads": 16, "deterministic": True}, 1),
        ({"window_right": 0, "deterministic": True}, 2),
        ({"window_right": 0, "kv_heads": 16, "qk_dim": 256, "v_dim": 256, "deterministic": True}, 2),
        ({"window_right": 0, "kv_heads": 16, "qk_dim": 256, "v_dim": 256, "q_len": 16384, "deterministic": True}, 1),
        ({"window_right": 0, "kv_heads": 16, "qk_dim": 256, "v_dim": 256, "q_len": 8192, "deterministic": True}, 1),
        ({"window_right": 0, "kv_heads": 16, "qk_dim": 192, "deterministic": True}, 1),
        ({"deterministic": True}, 6),
        ({"qk_dim": 256, "k_len": 16384, "deterministic": True}, 1),
    ],
)
def test_heads_whose_keys_start_side_by_side(changes: dict[str, Any], heads: int) -> None:
    problem = replace(PLAIN, **changes)
    tiles = -(-problem.k_len // backward_configs.pick(problem).block_n)
    assert backward_pass._section(problem, tiles) == heads


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 1),
        ({"qk_dim": 64, "v_dim": 64}, 2),
        ({"qk_dim": 64, "v_dim": 64, "window_right": 0}, 2),
        ({"qk_dim": 64, "v_dim": 64, "window_left": 100, "window_right": 0}, 1),
        ({"qk_dim": 64, "v_dim": 64, "table": True}, 1),
        ({"qk_dim": 192, "window_right": 0}, 1),
        ({"qk_dim": 256}, 1),
    ],
)
def test_blocks_of_dq_passed_on_together(changes: dict[str, Any], blocks: int) -> None:
    assert backward_configs.turn(replace(PLAIN, **changes)) == 0
    assert backward_configs.turn(replace(PLAIN, deterministic=True, **changes)) == blocks


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "none"),
        ({"q_len": 8192, "k_len": 8192}, "prologue"),
        ({"window_right": 0, "q_len": 2048, "k_len": 2048}, "none"),
        ({"qk_dim": 192}, "values"),
        ({"qk_dim": 192, "window_right": 0, "q_len": 8192, "k_len": 8192}, "values"),
        ({"qk_dim": 192, "window_right": 0, "deterministic": True}, "none"),
        ({"qk_dim": 192, "window_right": 0, "q_len": 2048, "k_len": 2048}, "none"),
        ({"qk_dim": 192, "softcap": 3.0}, "prologue"),
    ],
)
def test_one_kernel_clears_dq_or_none(changes: dict[str, Any], kernel: str) -> None:
    problem = replace(PLAIN, **changes)
    assert backward_configs.cleared_by(problem) == kernel
    assert backward_configs.cleared(problem) == (kernel != "none")


@pytest.mark.gpu(seconds=60.0)
@on_hopper
@pytest.mark.parametrize(
    "case",
    [
        Case("few-keys", "more to clear than steps", q_len=3000, k_len=40, heads=4, dim=192, v_dim=128),
        Case(
            "no-keys", "a sequence to which no program comes", q_lens=(500, 300, 2000), k_lens=(0, 40, 100), heads=4,
            dim=192, v_dim=128,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_the_launch_for_dv_clears_all_of_dq(case: Case) -> None:
    run_case(case, "hopper", torch.bfloat16, "cuda")  # whose memory is NaN before it is written


_AROUND = Case("around", "one tile of keys", q_len=1000, k_len=128, heads=4, kv_heads=2, dim=128)


@pytest.mark.gpu(seconds=60.0)
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        _AROUND,
        replace(
            _AROUND, id="around-many", why="more tiles than programs", q_len=2048, k_len=2048, heads=10, kv_heads=10
        ),
        replace(_AROUND, id="around-all", why="rows as keys", q_len=640, k_len=640, softcap=5.0, sinks=True, dlse=True),
        replace(_AROUND, id="around-odd", why="head dims that are no tiles'", q_len=300, k_len=256, dim=80, v_dim=72),
    ],
    ids=str,
)
def test_walks_go_around(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "hopper", dtype, "cuda")
