"""Rounds: each query head of a group comes to a tile of keys by itself, and what it adds to dK and dV is passed on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from places import hopper_plans_anew, on_hopper

from flashtile.backends.hopper import backward_configs, backward_pass
from flashtile.gpu import arguments
from flashtile.masks import Causal, Window
from flashtile.problem import Problem
from flashtile.testing import Case, build, evaluate, run_case

ORDERED = Problem(
    batch=2, q_len=1024, k_len=1024, q_heads=16, kv_heads=4, qk_dim=256, v_dim=256, dtype=torch.bfloat16,
    device="cuda", capability=(9, 0), scale=256**-0.5, window_right=0, deterministic=True,
)  # fmt: skip


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
        ({"qk_dim": 128, "v_dim": 128}, False),
        ({"deterministic": False}, False),
        ({"deterministic": False, "k_len": 2049}, True),
        ({"deterministic": False, "kv_heads": 2}, True),
    ],
)
def test_large_groups_of_wide_heads_come_in_rounds(changes: dict[str, Any], relays: bool) -> None:
    assert backward_configs.relays(replace(ORDERED, **changes)) == relays


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

on_gpu = [pytest.mark.gpu(seconds=60.0), on_hopper]


class TestOnHopper:
    pytestmark = on_gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "case",
        [
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
            replace(_UNSEEN, id="unseen", why="the same without rounds", kv_heads=None),
        ],
        ids=str,
    )  # fmt: skip
    def test_rounds(self, case: Case, dtype: torch.dtype) -> None:
        run_case(case, "hopper", dtype, "cuda")

    def test_keys_that_nobody_sees_hold_up_nobody(self) -> None:
        inputs = build(_UNSEEN, torch.bfloat16, "cuda")
        expected = evaluate(_UNSEEN, inputs, "hopper")
        for _ in range(100):
            found = evaluate(_UNSEEN, inputs, "hopper")
            assert [name for name in expected if not torch.equal(found[name], expected[name])] == []

    @pytest.mark.parametrize("cohort", [1, 2, 5])
    @pytest.mark.parametrize("case", [_RELAY, _LATENT], ids=str)
    def test_rounds_change_no_bit(self, case: Case, cohort: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a fixed order: sums are made in the order in which registers would."""
        case = replace(case, heads=24, kv_heads=6)
        inputs = build(case, torch.bfloat16, "cuda")
        with monkeypatch.context() as patch, hopper_plans_anew():
            patch.setattr(backward_configs, "relays", lambda problem: False)
            patch.setattr(backward_configs, "mirrors", lambda problem: False)
            expected = evaluate(case, inputs, "hopper")
        monkeypatch.setattr(backward_pass, "_cohort", lambda tiles: cohort)
        with hopper_plans_anew():
            found = evaluate(case, inputs, "hopper")
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
