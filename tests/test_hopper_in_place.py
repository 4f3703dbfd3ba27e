"""Weights in the place of scores, at head dim 64: which calls have them there, and that masks and sequences hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from places import on_hopper
from problems import problem_of

from flashtile.backends.hopper import configs
from flashtile.masks import Causal, Window
from flashtile.problem import Problem
from flashtile.testing import Case, build, evaluate, run_case

PLAIN = Problem(
    batch=2, q_len=4096, k_len=4096, q_heads=16, kv_heads=4, qk_dim=64, v_dim=64, dtype=torch.bfloat16,
    device="cuda", capability=(9, 0), scale=64**-0.5,
)  # fmt: skip
PACKED: dict[str, Any] = {"varlen": True, "total_q": 9000, "total_k": 9000}
CAUSAL: dict[str, Any] = {"window_right": 0}


@pytest.mark.parametrize(
    ("changes", "in_place"),
    [
        ({}, True),
        ({**CAUSAL, "sinks": True}, True),
        ({**CAUSAL, "k_len": 300}, True),
        ({**PACKED, "k_len": 300}, True),
        ({**PACKED, **CAUSAL, "k_len": 2048}, True),
        ({**PACKED, **CAUSAL, "k_len": 2047}, False),
        ({**CAUSAL, "window_left": 512}, True),
        ({**CAUSAL, "window_left": 511}, False),
        ({**CAUSAL, "window_left": 4096, "k_len": 511}, False),
        ({**PACKED, **CAUSAL, "window_left": 512}, True),
        ({"table": True}, False),
        ({"dropout_p": 0.1}, False),
        ({"qk_dim": 128}, False),
    ],
)
def test_weights_lie_in_the_scores_place_where_many_keys_are_seen(changes: dict[str, Any], in_place: bool) -> None:
    config = configs.forward(replace(PLAIN, **changes))
    assert config is not None
    assert (config.pieces == 0) == in_place


_PACKED = Case("in-place-varlen", "tiles of no rows", q_lens=(2100, 3, 0, 500), k_lens=(2100, 0, 70, 900), dim=64)
_WINDOW = Case("in-place-window", "tiles of others' rows", q_len=1300, k_len=1500, dim=64, mask=Window(600, 20))

IN_PLACE = (
    _PACKED,
    replace(_PACKED, id="in-place-varlen-causal", why="strips of their own", mask=Causal(), heads=4, kv_heads=2),
    replace(_PACKED, id="in-place-varlen-window", why="both ends", mask=Window(600, 0), sinks=True, dlse=True),
    replace(_PACKED, id="in-place-varlen-leaps", why="items done again", mask=Causal(), amplitude=300.0),
    _WINDOW,
    replace(_WINDOW, id="in-place-window-sinks", why="a sum without keys", mask=Window(512, 0), sinks=True),
    replace(_WINDOW, id="in-place-window-leaps", why="items done again", amplitude=300.0),
    replace(_WINDOW, id="in-place-narrow", why="O narrower than S", v_dim=24, mask=Causal()),
    replace(_WINDOW, id="in-place-tiny", why="O much narrower", dim=16, v_dim=8, mask=None),
)


@pytest.mark.parametrize("case", IN_PLACE, ids=str)
def test_the_cases_have_their_weights_there(case: Case) -> None:
    config = configs.forward(problem_of(case, PLAIN))
    assert config is not None
    assert config.pieces == 0


on_gpu = [pytest.mark.gpu(seconds=60.0), on_hopper]


class TestOnHopper:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("case", IN_PLACE, ids=str)
    def test_against_float64(self, case: Case, dtype: torch.dtype) -> None:
        run_case(case, "hopper", dtype, "cuda")

    @pytest.mark.parametrize("case", IN_PLACE, ids=str)
    def test_every_run_gives_the_same_bits(self, case: Case) -> None:
        inputs = build(case, torch.bfloat16, "cuda")
        expected = evaluate(case, inputs, "hopper")["out"]
        for _ in range(20):
            assert torch.equal(evaluate(case, inputs, "hopper")["out"], expected)
