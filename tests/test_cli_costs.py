"""Counted operations and bytes against numbers worked out by hand, and the grids that they are counted for."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
import torch

from flashtile.cli import costs, grids
from flashtile.cli.console import UsageError
from flashtile.cli.workload import Workload, make_inputs
from flashtile.validation import check_cu_seqlens_values


def work(**changes: object) -> Workload:
    base: dict[str, object] = {
        "id": "w",
        "batch": 2,
        "q_len": 100,
        "k_len": 100,
        "heads": 4,
        "kv_heads": 4,
        "qk_dim": 32,
        "v_dim": 32,
    }
    return Workload(**(base | changes))


@pytest.mark.parametrize(
    ("changes", "pairs"),
    [
        ({}, 2 * 100 * 100),
        ({"causal": True}, 2 * 100 * 100 / 2),
        # Row i of 3 sees i + 3 of 5 keys: 3 + 4 + 5.
        ({"causal": True, "batch": 1, "q_len": 3, "k_len": 5}, 12),
        # Row i of 5 sees i - 1 of 3 keys, none below 0: 0 + 0 + 1 + 2 + 3.
        ({"causal": True, "batch": 1, "q_len": 5, "k_len": 3}, 6),
        # Three keys a row, one and two in the first rows: 1 + 2 + 98 * 3.
        ({"causal": True, "batch": 1, "window": (2, 0)}, 297),
        ({"batch": 1, "window": (1, 1)}, 3 * 100 - 2),
        ({"lengths": (10, 20), "q_len": 20, "k_len": 20}, 100 + 400),
        ({"lengths": (10, 20), "q_len": 20, "k_len": 20, "causal": True}, 50 + 200),
        ({"padding": (100, 30)}, 100 * 100 + 100 * 30),
        # Padding cuts a causal triangle: rows 0..29 see i + 1 keys, the other 70 see 30.
        ({"padding": (30,), "batch": 1, "causal": True}, 465 + 70 * 30),
    ],
)
def test_visible_pairs_are_those_counted_by_hand(changes: dict[str, object], pairs: float) -> None:
    assert costs.visible_pairs(work(**changes)) == pairs


def test_flops_of_the_papers_own_example() -> None:
    """4 * seqlen^2 * head_dim * heads, halved if causal, 2.5 times that backward (Dao 2023, section 4.1)."""
    shape = work(batch=1, q_len=2048, k_len=2048, heads=16, kv_heads=16, qk_dim=128, v_dim=128)
    assert costs.flops(shape, "forward") == 34359738368
    causal = work(batch=1, q_len=2048, k_len=2048, heads=16, kv_heads=4, qk_dim=128, v_dim=128, causal=True)
    assert costs.flops(causal, "forward") == 17179869184
    assert costs.flops(causal, "backward") == 2.5 * 17179869184
    assert costs.flops(causal, "train") == 3.5 * 17179869184


def test_flops_of_unequal_head_dims() -> None:
    """S over 192 and O over 128; backward S, dQ, dK over 192 and dP, dV over 128."""
    shape = work(batch=1, heads=1, kv_heads=1, qk_dim=192, v_dim=128)
    assert costs.flops(shape, "forward") == 2 * 100 * 100 * (192 + 128)
    assert costs.flops(shape, "backward") == 2 * 100 * 100 * (3 * 192 + 2 * 128)


def test_bytes_move_every_tensor_once() -> None:
    shape = work(batch=1, q_len=10, k_len=20, heads=4, kv_heads=2, qk_dim=8, v_dim=4)
    q, k, v, out, lse = 10 * 4 * 8, 20 * 2 * 8, 20 * 2 * 4, 10 * 4 * 4, 10 * 4 * 4
    forward = 2 * (q + k + v + out) + lse
    assert costs.compulsory_bytes(shape, torch.bfloat16, "forward") == forward
    backward = 2 * (2 * (q + k + v) + 2 * out) + lse
    assert costs.compulsory_bytes(shape, torch.bfloat16, "backward") == backward
    assert costs.compulsory_bytes(shape, torch.bfloat16, "train") == forward + backward


def test_bytes_of_a_learned_bias_and_of_packed_sequences() -> None:
    plain, biased = work(), work(bias=(1, 4, 100, 100), bias_grad=True)
    extra = 4 * 100 * 100 * 2
    moved = {mode: costs.compulsory_bytes(biased, torch.float16, mode) for mode in ("forward", "backward")}
    assert moved["forward"] - costs.compulsory_bytes(plain, torch.float16, "forward") == extra
    assert moved["backward"] - costs.compulsory_bytes(plain, torch.float16, "backward") == 2 * extra
    packed = work(lengths=(10, 20), q_len=20, k_len=20)
    assert costs.compulsory_bytes(packed, torch.float32, "forward") == 4 * 4 * 30 * 4 * 32 + 4 * 30 * 4


def test_paper_grid_keeps_tokens_and_hidden_units() -> None:
    works = grids.sequence_grid("paper")
    assert len(works) == 5 * 3 * 2
    assert {w.batch * w.q_len for w in works} == {16384}
    assert {w.heads * w.qk_dim for w in works} == {2048}
    assert {w.qk_dim for w in works} == {64, 128, 256}
    assert sorted({w.q_len for w in works}) == [1024, 2048, 4096, 8192, 16384]


def test_what_is_asked_for_replaces_the_grid() -> None:
    only = grids.sequence_grid("small", [51200], [64], causal=False, batch=32, heads=8, kv_heads=2)
    assert [(w.batch, w.heads, w.kv_heads, w.q_len, w.qk_dim, w.causal) for w in only] == [(32, 8, 2, 51200, 64, False)]
    with pytest.raises(UsageError, match="--kv-heads: got 3, expected a divisor of 8"):
        grids.sequence_grid("small", kv_heads=3)


@pytest.mark.parametrize("feature", [*grids.FEATURES, "window+softcap", "bias+dropout+gqa"])
def test_every_feature_changes_a_plain_call(feature: str) -> None:
    plain, special = (
        grids.sequence_grid("quick", [128], [32], causal=True, features=[f])[0] for f in ("plain", feature)
    )
    changed = {name for name in vars(plain) if getattr(plain, name) != getattr(special, name)} - {"id", "feature"}
    assert bool(changed) == (feature != "plain")
    assert len(changed) >= len(feature.split("+")) or feature == "plain"


def test_window_is_512_keys_wide() -> None:
    for causal in (True, False):
        wide = grids.sequence_grid("small", [4096], [64], causal=causal, features=["window"])[0]
        lo, hi = wide.intervals(0)
        assert int((hi - lo).max()) == 512


def test_unknown_words_are_usage_errors() -> None:
    with pytest.raises(UsageError, match="got 'nothing'"):
        grids.check_features("plain,nothing")
    with pytest.raises(UsageError, match="got 'gpt-9'"):
        grids.model_grid("gpt-9")


MODELS = grids.model_grid()


def test_all_twenty_models_load() -> None:
    entries = json.loads(files("flashtile.cli").joinpath("model_shapes.json").read_text())["cases"]
    assert [w.id for w in MODELS] == [entry["id"] for entry in entries]
    assert len(MODELS) == 20
    assert [w.id for w in grids.model_grid("gemma,bloom")] == [
        "gemma2-9b-local-8k",
        "gemma2-9b-global-8k",
        "alibi-bloom-2k",
    ]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
def test_each_model_is_a_valid_problem(model: Workload) -> None:
    problem = model.problem(torch.bfloat16, "cuda", (9, 0))
    assert problem.q_heads % problem.kv_heads == 0
    assert 0 < costs.visible_pairs(model) <= model.batch * model.q_len * model.k_len
    assert model.padding is None or len(model.padding) == model.batch


def test_facts_of_some_models() -> None:
    by_id = {model.id: model for model in MODELS}
    packed = by_id["llama3-8b-packed-16k"]
    assert (packed.total, len(packed.lengths or ()), min(packed.lengths or ())) == (16384, 16, 64)
    assert by_id["deepseek-v3-train-4k"].v_dim == 128
    assert by_id["t5-large-512"].softmax_scale == 1.0
    assert not by_id["hunyuan-video-119k"].train
    # A window of 4096 keys over 16384 rows: the first 4096 rows see 1, 2, ..., the others all 4096.
    window = costs.visible_pairs(by_id["mistral-7b-train-16k"])
    assert window == 4096 * 4097 / 2 + (16384 - 4096) * 4096


def test_inputs_have_the_workload_shapes() -> None:
    packed = work(lengths=(10, 0, 20), q_len=20, k_len=20, alibi=True, sinks=True, kv_heads=2, v_dim=16)
    inputs = make_inputs(packed, torch.float32, "cpu", seed=3)
    assert inputs.cu_seqlens is not None
    check_cu_seqlens_values("cu_seqlens_q", inputs.cu_seqlens, 30, 20)
    assert (inputs.q.shape, inputs.k.shape, inputs.v.shape) == ((30, 4, 32), (30, 2, 32), (30, 2, 16))
    assert inputs.dout.shape == (30, 4, 16)
    assert torch.equal(inputs.q, make_inputs(packed, torch.float32, "cpu", seed=3).q)
    assert not torch.equal(inputs.q, make_inputs(packed, torch.float32, "cpu", seed=4).q)
    assert torch.allclose(inputs.slopes, torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]))
