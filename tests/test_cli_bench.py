"""`flashtile bench`: rows, the gate that turns it red, refusals, clocks, limits."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from places import HOPPER
from torch import Tensor
from typer.testing import CliRunner

from flashtile import reference
from flashtile.cli import bench, limits, machine, measure, roster, timing
from flashtile.cli.commands import app
from flashtile.cli.console import UsageError
from flashtile.cli.peers import Prepared, Standard
from flashtile.cli.workload import Inputs, Workload

QUICK = ["bench", "--quick", "--seconds", "0.001", "--device", "cpu", "--lengths", "64", "--causal", "--json"]
FEW = [*QUICK, "--peers", "standard,sdpa"]


def invoke(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code in (0, 1), result.output
    return result.exit_code, json.loads(result.stdout)


def test_rows_hold_what_a_figure_needs(tmp_path: Path) -> None:
    out = tmp_path / "new" / "rows.jsonl"
    code, result = invoke(*FEW, "--mode", "all", "--commit", "abc", "--out", str(out))
    assert (code, result["ok"], result["failed"]) == (0, True, 0)
    assert [(row["peer"], row["mode"]) for row in result["rows"]] == [
        (peer, mode) for mode in ("forward", "backward", "train") for peer in ("flashtile", "standard", "sdpa")
    ]
    for row in result["rows"]:
        assert row["status"] == "measured"
        assert set(row["gate"]) == {"out", "dq", "dk", "dv"}
        assert 0 < row["ms_q20"] <= row["ms"] <= row["ms_q80"]
        assert row["tflops"] == pytest.approx(row["flops"] / row["ms"] / 1e9)
        assert row["gbps"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["matmul_share"] == pytest.approx(row["tflops"] / row["limits"]["matmul_tflops"])
        assert row["copy_share"] == pytest.approx(row["gbps"] / row["limits"]["copy_gbps"])
        assert row["peak_bytes"] > row["extra_bytes"] >= 0
        assert (row["commit"], row["dtype"], row["grid"]) == ("abc", "bfloat16", "quick")
        assert row["versions"]["torch"] == torch.__version__
        assert row["device"]["type"] == "cpu"
    # 4 * 1 * 2 heads * 64 * 64 * 32 / 2, and 2.5 times that.
    assert [row["flops"] for row in result["rows"][::3]] == [524288, 1310720, 1835008]
    assert result["rows"][0]["backend"] == "blocked"
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert lines == result["rows"]
    invoke(*FEW, "--mode", "forward", "--out", str(out))
    assert len(out.read_text().splitlines()) == len(lines) + 3


class Slightly(Standard):
    """Standard attention whose last row is half as large again."""

    name = "slightly"

    def prepare(self, work: Workload, inputs: Inputs, backward: bool) -> Prepared:
        prepared = super().prepare(work, inputs, backward)
        honest = prepared.call

        def call() -> Tensor:
            out = honest()
            factor = torch.ones_like(out)
            factor[:, :, -1] = 1.5
            return out * factor

        prepared.call = call
        return prepared


class Broken(Standard):
    """It cannot run at all."""

    name = "broken"

    def prepare(self, work: Workload, inputs: Inputs, backward: bool) -> Prepared:
        raise RuntimeError("no such kernel image\nand more lines")


def test_a_wrong_peer_has_no_speed_and_turns_the_command_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roster.OTHERS, "slightly", Slightly())
    code, result = invoke(*QUICK, "--peers", "slightly,standard", "--mode", "both")
    assert (code, result["ok"], result["failed"]) == (1, False, 2)
    for row in result["rows"]:
        wrong = row["peer"] == "slightly"
        assert row["status"] == ("wrong" if wrong else "measured")
        assert ("ms" in row, "tflops" in row) == (not wrong, not wrong)
        assert not wrong or row["gate"]["out"]["ratio"] > 1
        assert not wrong or re.match(r"(out|d[qkv]): error .*, allowed ", row["reason"])
    text = CliRunner().invoke(app, [*QUICK[:-1], "--peers", "slightly", "--mode", "forward"])
    assert text.exit_code == 1
    assert "1 rows failed" in text.output


def test_a_wrong_flashtile_turns_the_command_red(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = reference.forward

    def wrong(problem, call, out=None):
        result, lse = honest(problem, call, out)
        return result + 0.05, lse

    monkeypatch.setattr(reference, "forward", wrong)
    code, result = invoke(*QUICK, "--peers", "none", "--backend", "reference", "--mode", "forward")
    assert code == 1
    assert result["rows"][0]["status"] == "wrong"


def test_a_peer_that_breaks_is_an_error_of_its_own_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(roster.OTHERS, "broken", Broken())
    code, result = invoke(*QUICK, "--peers", "broken", "--mode", "forward")
    assert code == 0
    own, broken = result["rows"]
    assert (own["status"], broken["status"]) == ("measured", "error")
    assert broken["reason"] == "RuntimeError: no such kernel image"


def test_a_flashtile_that_breaks_turns_the_command_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem, call, out=None):
        raise RuntimeError("device lost")

    monkeypatch.setattr(reference, "forward", broken)
    code, result = invoke(*QUICK, "--peers", "none", "--backend", "reference", "--mode", "forward")
    assert (code, result["rows"][0]["status"]) == (1, "error")


def test_refusals_are_rows_with_a_sentence() -> None:
    code, result = invoke(*QUICK, "--peers", "all", "--features", "softcap+dropout", "--mode", "forward")
    assert code == 0
    rows = {row["peer"]: row for row in result["rows"]}
    assert rows["sdpa"]["reason"] == "has no softcap"
    assert rows["flex"]["reason"] == "has no dropout"
    assert rows["sdpa-cudnn"]["reason"] == "runs on CUDA devices only"
    assert rows["standard"]["gate_note"].startswith("checked without dropout")
    assert "gate_note" not in rows["flashtile"]
    measured = {peer for peer, row in rows.items() if row["status"] == "measured"}
    assert measured == {"flashtile", "standard"}
    assert all(row["reason"] for peer, row in rows.items() if peer not in measured)


def test_who_has_no_backward_is_timed_forward() -> None:
    """The CPU's flash kernel takes a bias, but has no gradient for it."""
    _, result = invoke(*QUICK, "--peers", "sdpa-flash", "--features", "bias", "--mode", "all")
    rows = {row["mode"]: row for row in result["rows"] if row["peer"] == "sdpa-flash"}
    assert {mode: row["status"] for mode, row in rows.items()} == {
        "forward": "measured",
        "backward": "refused",
        "train": "refused",
    }
    assert (rows["forward"]["reason"], set(rows["forward"]["gate"])) == (None, {"out"})
    assert rows["backward"]["reason"] == "has no gradient of the bias"


def test_a_wrong_gradient_leaves_the_forward_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = reference.backward

    def wrong(problem, call, out, lse, dout, dlse, grads, bias_grad):
        extra = honest(problem, call, out, lse, dout, dlse, grads, bias_grad)
        grads[2].mul_(1.1)
        return extra

    monkeypatch.setattr(reference, "backward", wrong)
    code, result = invoke(*QUICK, "--peers", "none", "--backend", "reference", "--mode", "both")
    assert code == 1
    assert [(row["mode"], row["status"]) for row in result["rows"]] == [("forward", "measured"), ("backward", "wrong")]
    assert result["rows"][1]["reason"].startswith("dv: error")


def test_pytorchs_own_refusal_is_quoted() -> None:
    _, result = invoke(*QUICK, "--peers", "sdpa-flash", "--features", "dropout", "--mode", "forward")
    row = result["rows"][1]
    assert (row["status"], "dropout" in row["reason"]) == ("refused", True)


def test_backends_side_by_side_and_host_time() -> None:
    code, result = invoke(*QUICK, "--peers", "sdpa", "--backend", "blocked,reference", "--mode", "host")
    assert code == 0
    assert [row["peer"] for row in result["rows"]] == ["flashtile:blocked", "flashtile:reference", "sdpa"]
    assert all(row["host_us"] > 0 and row["case"] == "tiny" and "tflops" not in row for row in result["rows"])


def test_the_tables_can_be_read() -> None:
    text = CliRunner().invoke(app, [*FEW[:-3], "--peers", "standard,sdpa-math", "--mode", "all"])
    assert text.exit_code == 0
    for part in ("plain-causal-d32-n64", "GFLOP/s", "peak memory beyond inputs and results", "flashtile", "sdpa-math"):
        assert part in text.output


def test_inputs_that_do_not_fit_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000)
    _, result = invoke(*QUICK, "--peers", "none", "--mode", "forward")
    assert result["rows"][0]["reason"] == "not enough memory for the inputs"


def test_out_of_memory_is_a_refusal() -> None:
    assert measure._failure(torch.OutOfMemoryError("CUDA out of memory. Tried"), [])["status"] == "refused"
    assert measure._failure(ValueError("x"), [])["status"] == "error"
    assert measure._failure(ValueError("\x1b[91mx\x1b[0m\ny"), [])["reason"] == "ValueError: x"


def test_one_subprocess_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flashtile", *QUICK, "--peers", "none", "--mode", "forward"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"][0]["status"] == "measured"


def test_peak_memory_is_counted() -> None:
    a = torch.ones(1000, 1000)

    def action() -> Tensor:
        b = a + 1  # 4 MB live
        c = b * 2  # 8 MB live
        del b
        return c + 1  # 8 MB again

    assert timing.peak_bytes(timing.Plain(action), "cpu") == pytest.approx(8_000_000, abs=100)


def test_turns_begin_with_each_in_its_turn() -> None:
    turns = timing.in_turns(3)
    assert len(turns) == 3 * timing.TURNS
    assert turns[:9] == [0, 1, 2, 1, 2, 0, 2, 0, 1]


def test_the_host_is_timed_in_turns() -> None:
    calls: list[str] = []
    actions = [timing.Plain(partial(calls.append, name)) for name in "ab"]
    times = timing.host_times(actions, "cpu")
    assert [len(repeats) for repeats in times] == [timing.HOST_CALLS] * 2
    changes = sum(before != after for before, after in pairwise(calls))
    assert changes == timing.TURNS  # ab ba ab ba ab


def test_without_memory_for_all_at_once_each_is_timed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    together: list[int] = []
    real = timing.device_times

    def short_of_memory(actions: Any, device: str, seconds: float) -> list[list[float]]:
        together.append(len(actions))
        if len(actions) > 1:
            raise torch.OutOfMemoryError
        return real(actions, device, seconds)

    monkeypatch.setattr(timing, "device_times", short_of_memory)
    code, result = invoke(
        "bench", "--quick", "--device", "cpu", "--seconds", "0.001", "--lengths", "64", "--causal", "--json",
        "--mode", "forward", "--peers", "standard",
    )  # fmt: skip
    assert code == 0
    assert together == [2, 1, 1]
    assert [row["status"] for row in result["rows"]] == ["measured", "measured"]


def test_quantiles_and_turns() -> None:
    assert timing.quantiles([float(n) for n in range(11)]) == (5.0, 2.0, 8.0)
    seen: list[str] = []
    first, second = timing.Plain(lambda: seen.append("a")), timing.Plain(lambda: seen.append("b"))
    repeats = timing.device_times([first, second], "cpu", 0.0001)
    assert seen == ["a", "b"] * (len(seen) // 2)
    assert len(repeats[0]) == len(repeats[1]) >= timing.LEAST_REPEATS["cpu"]


def test_limits_are_those_of_a_machine() -> None:
    found = limits.measure(torch.float32, "cpu", 0.001, quick=True)
    assert 1e-4 < found.matmul_tflops < 1e4
    assert 0.1 < found.copy_gbps < 1e5


def test_options_reject_what_they_cannot_mean() -> None:
    with pytest.raises(UsageError, match="--seconds: got -1"):
        bench.run(bench.Options(seconds=-1.0, device="cpu"))


def test_the_commit_is_that_of_the_checkout() -> None:
    commit = machine.commit()
    assert commit is None or len(commit.rstrip("+")) == 12


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    arguments = ["bench", "--quick", "--seconds", "0.001", "--device", "cuda", "--lengths", "128", "--causal", "--json"]
    peers = "standard,sdpa,sdpa-flash,sdpa-efficient,sdpa-cudnn,sdpa-math"
    code, result = invoke(*arguments, "--mode", "all", "--dims", "64", "--peers", peers)
    assert code == 0, [row["reason"] for row in result["rows"]]
    for row in result["rows"]:
        assert row["status"] in ("measured", "refused")
        if row["own"]:
            assert (row["backend"], row["status"]) == ("hopper" if HOPPER else "triton", "measured")
        assert row["device"]["type"] == "cuda"
    measured = {row["peer"] for row in result["rows"] if row["status"] == "measured"}
    assert {"flashtile", "standard", "sdpa-flash"} <= measured
    code, result = invoke(*arguments, "--mode", "host", "--peers", "sdpa")
    assert (code, [row["host_us"] > 0 for row in result["rows"]]) == (0, [True, True])


@pytest.mark.gpu
def test_peak_memory_is_counted_on_a_gpu() -> None:
    a = torch.ones(1024, 1024, device="cuda")
    assert timing.peak_bytes(timing.Plain(lambda: (a + 1) * 2), "cuda") == 2 * a.nbytes
