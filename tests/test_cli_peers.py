"""Every peer of bench against the gate, on small copies of all grids' calls; and the gate against wrong peers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile.cli import gate, grids
from flashtile.cli.peers import Flashtile, Peer, Prepared, Setting, Standard
from flashtile.cli.peers_flash import FLASH_2, FLASH_3, FLASH_4, Flash
from flashtile.cli.peers_torch import Flex, Sdpa
from flashtile.cli.workload import Inputs, Workload, make_inputs


def shrink(work: Workload) -> Workload:
    """The call with few rows, heads and channels, but all its features."""
    heads = 2 * work.heads // work.kv_heads if work.kv_heads < work.heads else min(work.heads, 2)
    kv_heads = 2 if work.kv_heads < work.heads else heads
    batch = min(work.batch, 3)
    lengths = None if work.lengths is None else tuple(-(-length // 64) for length in work.lengths[:batch])
    q_len, k_len = (max(lengths),) * 2 if lengths else (min(work.q_len, 70), min(work.k_len, 70))
    return replace(
        work,
        batch=batch,
        q_len=q_len,
        k_len=k_len,
        heads=heads,
        kv_heads=kv_heads,
        qk_dim=work.qk_dim // 4,
        v_dim=work.v_dim // 4,
        window=None if work.window is None else (20, work.window[1]),
        bias=None if work.bias is None else (1, heads, q_len, k_len),
        lengths=lengths,
        padding=None if work.padding is None else tuple(1 + length % k_len for length in work.padding[:batch]),
    )


FEATURES = [*grids.FEATURES, "window+softcap", "bias+dropout", "gqa+sinks+alibi"]
FEATURED = [
    shrink(work) if work.feature == "documents" else work
    for work in grids.sequence_grid("quick", [65], [16], features=FEATURES, heads=4, batch=2)
]
WORKS = [shrink(model) for model in grids.model_grid()] + FEATURED


def judge(peer: Peer, work: Workload, dtype: torch.dtype = torch.float32, backward: bool = True) -> tuple[bool, dict]:
    inputs = make_inputs(work, dtype, "cpu")
    torch.manual_seed(inputs.seed)
    drops = work.dropout_p > 0 and peer.drops_alike
    if not drops:
        work = replace(work, dropout_p=0.0)
    results = peer.prepare(work, inputs, backward).results(backward, work)
    return gate.check(results, gate.expectations(work, inputs, backward, drops))


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.id)
@pytest.mark.parametrize(
    "peer", [Flashtile("reference"), Standard(), Sdpa(), Sdpa("flash")], ids=lambda peer: peer.name
)
def test_peers_pass_the_gate_where_they_do_not_refuse(peer: Peer, work: Workload) -> None:
    if peer.refuses(work, Setting("cpu", torch.float32, backward=True)) is not None:
        return
    right, worst = judge(peer, work)
    assert right, worst
    wanted = (
        {"out", "dq", "dk", "dv"} | ({"dbias"} if work.bias_grad else set()) | ({"dsinks"} if work.sinks else set())
    )
    assert set(worst) == wanted


def test_who_refuses_what_on_a_cpu() -> None:
    setting = Setting("cpu", torch.float32, backward=True)
    refusing = {work.feature for work in FEATURED if Sdpa("flash").refuses(work, setting) is not None}
    assert refusing == {
        "softcap",
        "bias",
        "sinks",
        "packed",
        "documents",
        "window+softcap",
        "bias+dropout",
        "gqa+sinks+alibi",
    }
    assert all(Standard().refuses(work, setting) is None for work in FEATURED)
    assert Flex().refuses(FEATURED[0], setting) == "has no backward on the CPU"
    assert Sdpa("cudnn").refuses(FEATURED[0], setting) == "runs on CUDA devices only"


def test_half_precision_and_forward_alone_pass_too() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        right, worst = judge(Standard(), WORKS[0], dtype, backward=False)
        assert right
        assert set(worst) == {"out"}
        assert worst["out"]["ratio"] > 0


class Wrong(Standard):
    """Standard attention with one thing spoiled."""

    name = "wrong"

    def __init__(self, spoil: Callable[[dict[str, Tensor]], object]) -> None:
        self.spoil = spoil

    def prepare(self, work: Workload, inputs: Inputs, backward: bool) -> Prepared:
        prepared = super().prepare(work, inputs, backward)
        honest = prepared.results

        def results(backward: bool, work: Workload) -> dict[str, Tensor]:
            found = honest(backward, work)
            self.spoil(found)
            return found

        prepared.results = results
        return prepared


def last_row(results: dict[str, Tensor]) -> None:
    results["out"][:, -1] *= 1.02


SPOILED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "one row of out": last_row,
    "a thousandth in dq": lambda results: results["dq"].mul_(1.001),
    "dk of the other sign": lambda results: results["dk"].neg_(),
    "no dv": lambda results: results["dv"].zero_(),
    "a nan": lambda results: results["out"][0, 0, :, 0].fill_(torch.nan),
    "bias gradient of one batch element": lambda results: results["dbias"].mul_(0.5),
    "sink gradient": lambda results: results["dsinks"].add_(0.01),
}


@pytest.mark.parametrize("name", SPOILED)
def test_the_gate_closes_on_a_wrong_result(name: str) -> None:
    work = grids.sequence_grid("quick", [65], [16], causal=True, features=["bias+sinks"], heads=1, batch=2)[0]
    assert judge(Wrong(lambda results: None), work)[0]
    right, worst = judge(Wrong(SPOILED[name]), work)
    assert not right
    assert max(entry["ratio"] for entry in worst.values()) > 1


def test_the_gate_closes_on_a_wrong_mask() -> None:
    causal, full = (grids.sequence_grid("quick", [65], [16], causal=c)[0] for c in (True, False))
    inputs = make_inputs(causal, torch.float32, "cpu")
    results = Standard().prepare(full, inputs, True).results(True, full)
    assert not gate.check(results, gate.expectations(causal, inputs, True, drops=False))[0]


def test_the_gate_closes_on_another_dropout_pattern() -> None:
    work = grids.sequence_grid("quick", [65], [16], causal=True, features=["dropout"])[0]
    inputs = make_inputs(work, torch.float32, "cpu")
    expected = gate.expectations(work, inputs, True, drops=True)
    for seed, right in ((inputs.seed, True), (inputs.seed + 1, False)):
        torch.manual_seed(seed)
        results = Flashtile("reference").prepare(work, inputs, True).results(True, work)
        assert gate.check(results, expected)[0] is right


def test_standard_attention_too_large_for_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashtile.cli.machine.free_memory", lambda device: 100_000)
    reason = Standard().refuses(FEATURED[0], Setting("cpu", torch.float32, backward=True))
    assert reason is not None
    assert "GiB for its score matrices" in reason


def _flash_2(module: ModuleType) -> None:
    """Its signature is the one that flashtile offers under the same names."""
    module.flash_attn_func = flashtile.flash_attn_func
    module.flash_attn_varlen_func = flashtile.flash_attn_varlen_func


def _sides(window: tuple[int | None, int | None]) -> tuple[int | None, int | None]:
    left, right = window
    return (None if left == -1 else left), (None if right == -1 else right)


def _flash_3(module: ModuleType) -> None:
    def dense(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0):
        return flashtile.attention(
            q, k, v, scale=softmax_scale, causal=causal, window=_sides(window_size), softcap=softcap
        )

    def packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale=None, causal=False,
               window_size=(-1, -1), softcap=0.0):  # fmt: skip
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return flashtile.attention_varlen(
            q, k, v, *ends, scale=softmax_scale, causal=causal, window=_sides(window_size), softcap=softcap
        )

    module.flash_attn_func, module.flash_attn_varlen_func = dense, packed


def _flash_4(module: ModuleType) -> None:
    def dense(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0):
        keywords = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        return flashtile.attention(q, k, v, sinks=learnable_sink, return_lse=True, **keywords)

    def packed(q, k, v, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
               softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
               softcap=0.0):  # fmt: skip
        keywords = {"scale": softmax_scale, "causal": causal, "window": window_size, "softcap": softcap}
        ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return flashtile.attention_varlen(q, k, v, *ends, sinks=learnable_sink, return_lse=True, **keywords)

    module.flash_attn_func, module.flash_attn_varlen_func = dense, packed


STAND_INS = ((FLASH_2, _flash_2), (FLASH_3, _flash_3), (FLASH_4, _flash_4))


@pytest.mark.parametrize(("peer", "fill"), STAND_INS, ids=[peer.name for peer, _ in STAND_INS])
def test_flash_packages_are_called_as_their_signatures_say(
    peer: Flash, fill: Callable[[ModuleType], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins that have the packages' own signatures: each call that the peer takes comes out right."""
    module = ModuleType(peer.module)
    fill(module)
    monkeypatch.setitem(sys.modules, peer.module, module)
    if "." in peer.module:
        monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert peer.missing() is None
    taken = []
    for work in WORKS:
        if peer.refuses(work, Setting("cuda", torch.bfloat16, backward=True)) is None:
            right, worst = judge(peer, work)
            assert right, (work.id, worst)
            taken.append(work.feature)
    assert {"plain", "softcap", "window", "gqa", "packed", "model"} <= set(taken)
    assert ("alibi" in taken, "sinks" in taken) == (peer is FLASH_2, peer is FLASH_4)


def test_an_absent_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "flash_attn cannot be imported" in (FLASH_2.missing() or "")
    # FlashAttention 4 installs the same top-level name without FlashAttention 2's functions.
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace())
    assert FLASH_2.missing() == "flash_attn cannot be imported: flash_attn has no flash_attn_func"
    # flashtile must not be timed as its own rival.
    served = SimpleNamespace(flash_attn_func=flashtile.flash_attn_func, SERVED_BY_FLASHTILE=True)
    monkeypatch.setitem(sys.modules, "flash_attn", served)
    assert "flash_attn is flashtile itself" in (FLASH_2.missing() or "")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_flex_attention_passes_the_gate() -> None:
    """Compiled, so one call stands for the masks and one for the score changes."""
    for features, causal in (("alibi+softcap+window+gqa", True), ("packed", False)):
        work = grids.sequence_grid("quick", [130], [32], causal=causal, features=[features], heads=4)[0]
        right, worst = judge(Flex(), work, backward=False)
        assert right, worst
