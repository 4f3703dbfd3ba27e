"""Rounds: each query head of a group comes to a tile of keys by itself, and what it adds to dK and dV is passed on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from places import hopper_plans_anew, on_hopper
from problems import problem_of

from flashtile.backends.hopper import backward_configs, backward_pass
from flashtile.gpu import arguments
from flashtile.masks import Causal, Window
from flashtile.problem import Problem
from flashtile.testing import Case, build, evaluate, run_case

ORDERED = Problem(
    batch=2, q_len=1024, k_len=1024, q_heads=16, kv_heads=4, qk_dim=256, v_dim=256, dtype=torch.bfloat16,
    device="cuda", capability=(9, 0), scale=256**-0.5, window_right=0, deterministic=True,
)  # fmt: skip
NARROW: dict[str, Any] = {"qk_dim": 128, "v_dim": 128, "batch": 9, "kv_heads": 2}


@pytest.mark.parametrize(
    ("changes", "relays"),
    [
        ({}, True),
        ({"k_len": 1023, "sinks": True, "dropout_p": 0.1}, True),
        ({"bias": "additive", "bias_shape": (1, 16, 1024, 1024)}, True),
        ({"varlen": True, "total_q": 9, "total_k": 9}, True),
        ({"qk_dim": 192, "v_dim": 128}, True),
        ({"qk_dim": 64}, True),
        ({"kv_heads": 8}, False),  # groups of two
        ({"kv_heads": 16}, False),
        ({"window_right": None}, False),
        ({"window_left": 100}, False),
        ({"table": True}, False),
        ({"deterministic": False}, False),
        ({"deterministic": False, "k_len": 2049}, True),
        ({"deterministic": False, "kv_heads": 2}, True),
        (NARROW, True),
        ({**NARROW, "deterministic": False}, True),
        ({**NARROW, "qk_dim": 80, "v_dim": 80}, True),
        ({**NARROW, "qk_dim": 64, "v_dim": 64}, False),
        ({**NARROW, "kv_heads": 4}, False),  # groups of four
        ({**NARROW, "k_len": 1023}, False),
        ({**NARROW, "batch": 8}, False),  # 128 tiles, not even one for each program
        ({**NARROW, "window_left": 100}, False),
    ],
)
def test_large_groups_come_in_rounds(changes: dict[str, Any], relays: bool) -> None:
    assert backward_configs.relays(replace(ORDERED, **changes)) == relays


@pytest.mark.parametrize(
    ("changes", "tiles", "alone"),
    [
        ({}, 16, 12),
        ({}, 3, 3),
        ({"kv_heads": 2}, 64, 56),
        ({"kv_heads": 2}, 7, 7),
        ({"k_len": 4097}, 65, 65),
        ({"k_len": 8192, "deterministic": False}, 128, 96),
    ],
)
def test_short_walks_are_gone_through_with_all_heads_at_once(changes: dict[str, Any], tiles: int, alone: int) -> None:
    """As many as make no more than one long walk; not where the rows of all heads in order take too much memory."""
    assert backward_configs.alone(replace(ORDERED, **changes), tiles) == alone


@pytest.mark.parametrize(
    ("changes", "columns"), [({}, 512), ({"qk_dim": 192, "v_dim": 128}, 192), ({"qk_dim": 192, "v_dim": 192}, 512)]
)
def test_sums_wait_for_the_next_round(changes: dict[str, Any], columns: int) -> None:
    """float32, for each key and key-value head, beside two numbers for each 64 of them that begin as 0."""
    problem = replace(ORDERED, **changes, k_len=1000)
    rows, _, counters, _, gathered = backward_pass._scratch(problem, torch.empty(0))
    assert gathered.shape == (2 * 4 * 1024, columns)
    assert counters.numel() == 3 + rows.shape[1] // 64 + 2 * len(gathered) // 64
    assert not counters.any()


def test_packed_sequences_have_room_for_the_keys_of_each() -> None:
    problem = replace(ORDERED, varlen=True, total_q=500, total_k=300)
    assert arguments.padded_keys(problem) == 640
    assert arguments.scratch_keys(problem) == 4 * 640


@pytest.mark.parametrize(("tiles", "heads"), [(1, 264), (16, 16), (100, 2), (10**6, 2)])
def test_rounds_have_two_tiles_for_each_program(tiles: int, heads: int) -> None:
    assert backward_pass._cohort(tiles) == heads


_RELAY = Case(
    "relay", "heads of two groups", q_len=500, k_len=500, heads=8, kv_heads=2, dim=256, mask=Causal(),
    deterministic=True,
)  # fmt: skip
_LATENT = replace(_RELAY, id="relay-latent", why="two consumers of dK alone", dim=192, v_dim=128)

# Items without a step follow each other, and consumers have nothing to wait for but each other's sums.
_UNSEEN = Case(
    "relay-unseen", "keys that nobody sees", q_lens=(300, 0, 0, 0, 700, 0, 0, 20),
    k_lens=(700, 900, 9, 64, 400, 700, 65, 9), heads=6, kv_heads=2, dim=256, mask=Causal(), deterministic=True,
)  # fmt: skip

# Groups of eight, with tiles for more programs than there are.
_NARROW = replace(_RELAY, id="relay-128", batch=1, q_len=260, k_len=1030, heads=136, kv_heads=17, dim=128)
_NARROW_UNSEEN = replace(
    _UNSEEN, id="relay-unseen-128", k_lens=(700, 900, 9, 64, 1030, 700, 65, 9), heads=24, kv_heads=3, dim=128
)

ROUNDS = (
    _RELAY,
    _LATENT,
    replace(_RELAY, id="relay-odd", why="head dims that are no tiles'", dim=144, v_dim=200, k_len=333),
    replace(_RELAY, id="relay-uneven", why="keys of a tile", dim=64, v_dim=256, heads=6, dlse=True),
    replace(_RELAY, id="relay-blind", why="rows that see nothing", q_len=900, k_len=256, softcap=5.0),
    replace(_RELAY, id="relay-few", why="rows for the last keys only", q_len=70, k_len=1024, sinks=True),
    replace(_RELAY, id="relay-ahead", why="keys after a row's own", mask=Window(None, 100), alibi="heads"),
    replace(_RELAY, id="relay-behind", why="keys that nobody sees", mask=Window(None, -150), dropout_p=0.2),
    replace(_RELAY, id="relay-bias", why="a gradient of each head", bias="additive", bias_axes="1hqk"),
    replace(_RELAY, id="relay-any-order", why="eight heads", heads=16, deterministic=False),
    replace(_LATENT, id="relay-latent-any", why="eight heads", heads=16, k_len=700, deterministic=False),
    replace(_RELAY, id="relay-long", why="zeros for dQ", q_len=2200, k_len=2200, deterministic=False),
    Case(
        "relay-varlen", "sequences of any number of tiles, also none", q_lens=(300, 0, 700, 20),
        k_lens=(700, 90, 400, 200), heads=6, kv_heads=2, dim=256, mask=Causal(), deterministic=True,
    ),
    _UNSEEN,
    _NARROW,
    replace(_NARROW, id="relay-96", why="in any order", dim=96, v_dim=72, deterministic=False, dlse=True),
    replace(_NARROW, id="relay-128-all", why="features", softcap=5.0, alibi="heads", sinks=True, dropout_p=0.2),
    replace(_NARROW, id="relay-128-bias", why="a gradient of each", bias="additive", bias_axes="1hqk"),
    _NARROW_UNSEEN,
)  # fmt: skip


@pytest.mark.parametrize("case", ROUNDS, ids=str)
def test_the_cases_come_in_rounds(case: Case) -> None:
    assert backward_configs.relays(problem_of(case, ORDERED))


on_gpu = [pytest.mark.gpu(seconds=60.0), on_hopper]


class TestOnHopper:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "case", [*ROUNDS, replace(_UNSEEN, id="unseen", why="the same without rounds", kv_heads=None)], ids=str
    )
    def test_rounds(self, case: Case, dtype: torch.dtype) -> None:
        run_case(case, "hopper", dtype, "cuda")

    @pytest.mark.parametrize("case", [_UNSEEN, _NARROW_UNSEEN], ids=str)
    def test_keys_that_nobody_sees_hold_up_nobody(self, case: Case) -> None:
        inputs = build(case, torch.bfloat16, "cuda")
        expected = evaluate(case, inputs, "hopper")
        for _ in range(100):
            found = evaluate(case, inputs, "hopper")
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == []

    @pytest.mark.parametrize("cohort", [1, 2, 5])
    @pytest.mark.parametrize(
        "case", [replace(_RELAY, heads=24, kv_heads=6), replace(_LATENT, heads=24, kv_heads=6), _NARROW], ids=str
    )
    def test_rounds_change_no_bit(self, case: Case, cohort: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a fixed order: sums are made in the order in which registers would."""
        inputs = build(case, torch.bfloat16, "cuda")
        with monkeypatch.context() as patch, hopper_plans_anew():
            patch.setattr(backward_configs, "relays", lambda problem: False)
            patch.setattr(backward_configs, "mirrors", lambda problem: False)
            expected = evaluate(case, inputs, "hopper")
        monkeypatch.setattr(backward_pass, "_cohort", lambda tiles: cohort)
        with hopper_plans_anew():
            found = evaluate(case, inputs, "hopper")
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
