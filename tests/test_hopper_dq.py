"""How dQ comes about in the backward on Hopper: who clears it, who stores and who adds, in which order tiles start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from places import hopper_plans_anew, on_hopper

from flashtile.backends.hopper import backward_configs, backward_pass
from flashtile.masks import Causal, Window
from flashtile.problem import Problem
from flashtile.testing import Case, run_case

PLAIN = Problem(
    batch=2, q_len=4096, k_len=4096, q_heads=16, kv_heads=4, qk_dim=128, v_dim=128, dtype=torch.bfloat16,
    device="cuda", capability=(9, 0), scale=128**-0.5,
)  # fmt: skip


def test_there_are_counters_for_each_launch_and_block() -> None:
    """Three launches at most take items; the numbers of blocks of dQ come behind."""
    problem = replace(PLAIN, qk_dim=192, v_dim=128, deterministic=True, kv_heads=8)
    rows, accumulated, counters, *_ = backward_pass._scratch(problem, torch.empty(0, device="meta"))
    assert accumulated.numel() == rows.shape[1] * 192
    assert counters.numel() == 3 + rows.shape[1] // 64


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
        ({"q_len": 1024, "qk_dim": 64, "v_dim": 64, "deterministic": True}, False),
        ({"q_len": 1024, "qk_dim": 64, "v_dim": 64, "deterministic": True, "kv_heads": 16}, True),
        ({"q_len": 1024, "qk_dim": 64, "v_dim": 64, "window_left": 9, "deterministic": True}, False),
        ({"q_len": 10**6, "window_left": 2048}, False),
        ({"q_len": 10**6, "window_left": 2000, "window_right": 100}, True),
        ({"q_len": 10**6, "window_left": 100, "window_right": None}, True),
        ({"q_len": 4096, "varlen": True, "total_q": 9, "total_k": 9}, False),
        ({"q_len": 5000, "varlen": True, "total_q": 9, "total_k": 9}, True),
    ],
)
def test_the_first_tile_stores_dq_where_it_is_known_or_walks_are_short(changes: dict[str, Any], cleared: bool) -> None:
    problem = replace(PLAIN, **{"window_right": 0, "k_len": changes["q_len"], "kv_heads": 8, **changes})
    assert backward_configs.cleared(problem) == cleared
    rows, _, counters, *_ = backward_pass._scratch(problem, torch.empty(0, device="meta"))
    counted = problem.deterministic or not cleared
    assert counters.numel() == 3 + (rows.shape[1] // 64 if counted else 0)


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
        ({"window_right": 0, "deterministic": True}, 4),
        ({"window_right": 0, "deterministic": True, "k_len": 8192}, 2),
        ({"window_right": 0, "deterministic": True, "qk_dim": 256, "v_dim": 256, "kv_heads": 8}, 2),
        ({"window_right": 0, "deterministic": True, "qk_dim": 256, "v_dim": 256, "kv_heads": 8, "k_len": 2048}, 4),
        ({"window_right": 0, "deterministic": True, "qk_dim": 256, "v_dim": 256, "k_len": 8192}, 2),
        ({"window_right": 0, "deterministic": True, "qk_dim": 256, "v_dim": 256, "k_len": 1024}, 8),
        ({"window_right": 0, "deterministic": True, "qk_dim": 192}, 1),
        ({"window_right": 0, "deterministic": True, "k_len": 2**20}, 1),
        ({"window_right": 0, "deterministic": True, "k_len": 4095}, 2),
        ({"window_right": 0, "kv_heads": 16, "qk_dim": 256, "v_dim": 256, "deterministic": True}, 2),
        ({"window_right": 0, "kv_heads": 16, "qk_dim": 256, "v_dim": 256, "q_len": 16384, "deterministic": True}, 1),
        ({"window_right": 0, "kv_heads": 16, "qk_dim": 256, "v_dim": 256, "q_len": 8192, "deterministic": True}, 1),
        ({"window_right": 0, "kv_heads": 16, "qk_dim": 192, "deterministic": True}, 1),
        ({"deterministic": True}, 6),
        ({"qk_dim": 256, "k_len": 16384, "deterministic": True}, 1),
        ({"window_right": 0, "kv_heads": 16, "qk_dim": 192, "makes": "keys"}, 4),
        ({"window_right": 0, "kv_heads": 16, "qk_dim": 192, "makes": "values"}, 8),
        ({"window_right": 0, "kv_heads": 16, "qk_dim": 192, "makes": "values", "deterministic": True}, 8),
        ({"window_right": 0, "kv_heads": 16, "qk_dim": 192, "makes": "values", "q_len": 16384}, 3),
        ({"qk_dim": 192, "makes": "values", "deterministic": True}, 1),
    ],
)
def test_heads_whose_keys_start_side_by_side(changes: dict[str, Any], heads: int) -> None:
    problem = replace(PLAIN, **{name: value for name, value in changes.items() if name != "makes"})
    makes = changes.get("makes", backward_configs.launches(problem)[-1].makes)
    tiles = -(-problem.k_len // backward_configs.pick(problem, makes=makes).block_n)
    assert backward_pass._section(problem, tiles, makes) == heads


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({}, 1),
        ({"qk_dim": 64, "v_dim": 64}, 2),
        ({"qk_dim": 64, "v_dim": 64, "window_right": 0, "kv_heads": 16}, 2),
        ({"qk_dim": 64, "v_dim": 64, "window_right": 0}, 1),
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
        ({"qk_dim": 192}, "backward_values"),
        ({"qk_dim": 192, "window_right": 0, "q_len": 8192, "k_len": 8192, "batch": 8}, "backward_early_values"),
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


@pytest.mark.parametrize(
    ("changes", "mirrored"),
    [
        ({}, True),
        ({"q_len": 100, "window_right": 5, "alibi": True, "sinks": True, "dropout_p": 0.1, "softcap": 5.0}, True),
        ({"qk_dim": 80, "v_dim": 72}, True),
        ({"deterministic": False}, False),
        ({"kv_heads": 16}, False),  # items are short
        ({"window_right": None}, False),
        ({"window_left": 4000}, False),
        ({"table": True}, False),
        ({"bias": "additive", "bias_shape": (1, 16, 4096, 4096)}, False),
        ({"varlen": True, "total_q": 9, "total_k": 9}, False),
        ({"k_len": 4097}, False),
        ({"qk_dim": 64, "v_dim": 64}, True),
        ({"qk_dim": 256}, False),  # heads come in rounds
        ({"qk_dim": 256, "kv_heads": 8}, True),
    ],
)
def test_grouped_heads_in_order_start_at_either_end(changes: dict[str, Any], mirrored: bool) -> None:
    problem = replace(PLAIN, **{"window_right": 0, "deterministic": True, **changes})
    assert backward_configs.mirrors(problem) == mirrored


_MIRRORED = Case(
    "mirrored", "sections of one head", q_len=500, k_len=512, heads=6, kv_heads=3, dim=128, mask=Causal(),
    deterministic=True,
)  # fmt: skip


@pytest.mark.gpu(seconds=60.0)
@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        _MIRRORED,
        replace(
            _MIRRORED, id="mirrored-odd", why="head dims that are no tiles'", dim=80, v_dim=72, q_len=700, dlse=True
        ),
        replace(_MIRRORED, id="mirrored-blind", why="rows that see nothing", q_len=900, k_len=256, softcap=5.0),
        replace(_MIRRORED, id="mirrored-wide", why="a gradient to each consumer", dim=256),
        replace(_MIRRORED, id="mirrored-latent", why="a launch for dV, in any order", dim=192, v_dim=128),
        replace(_MIRRORED, id="mirrored-narrow", why="two consumers", dim=64),
        replace(_MIRRORED, id="mirrored-few", why="rows for the last keys only", q_len=70, k_len=1024, sinks=True),
        replace(_MIRRORED, id="mirrored-ahead", why="keys after a row's own", mask=Window(None, 100), alibi="heads"),
        replace(_MIRRORED, id="mirrored-behind", why="keys that nobody sees", mask=Window(None, -150), dropout_p=0.2),
    ],
    ids=str,
)
def test_walks_from_either_end(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backward_pass, "_section_in_order", lambda *problem: 1)
    with hopper_plans_anew():
        run_case(case, "hopper", dtype, "cuda")
