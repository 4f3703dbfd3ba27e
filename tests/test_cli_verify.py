"""`flashtile verify`: named and random cases, green where exact, red where a backend is not."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from flashtile import dispatch, execution
from flashtile.backends import blocked
from flashtile.cli import verify
from flashtile.cli.commands import app
from flashtile.cli.random_cases import random_case
from flashtile.problem import Problem
from flashtile.testing import Case

FEW = ["verify", "--case", "gqa,sinks-causal,bias-heads", "--device", "cpu", "--backend", "blocked"]


def invoke(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code in (0, 1), result.output
    return result.exit_code, json.loads(result.stdout)


def test_rows_hold_errors_beside_pytorchs_own() -> None:
    code, result = invoke(*FEW, "--dtype", "float32,float16")
    assert (code, result["ok"]) == (0, True)
    assert result["counts"]["ok"] == len(result["rows"]) > 6
    row = next(row for row in result["rows"] if row["case"] == "bias-heads" and row["dtype"] == "float16")
    assert set(row["errors"]) == {"out", "lse", "dq", "dk", "dv", "dbias"}
    for error in row["errors"].values():
        assert 0 <= error["error"] <= error["allowed"]
        assert error["allowed"] >= 2 * error["plain"]


def test_forward_only_leaves_gradients_out() -> None:
    _, result = invoke(*FEW, "--dtype", "float32", "--forward-only")
    assert all(set(row["errors"]) == {"out", "lse"} for row in result["rows"])


def test_a_wrong_gradient_turns_the_command_red(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = blocked.backward

    def wrong(problem, call, out, lse, dout, dlse, grads, bias_grad):
        extra = honest(problem, call, out, lse, dout, dlse, grads, bias_grad)
        grads[1].mul_(1.01)
        return extra

    monkeypatch.setattr(blocked, "backward", wrong)
    code, result = invoke(*FEW, "--dtype", "float32")
    assert (code, result["ok"], result["counts"]["ok"]) == (1, False, 0)
    assert all(row["reason"].startswith("dk: error") for row in result["rows"])
    text = CliRunner().invoke(app, [*FEW, "--dtype", "float32"])
    assert text.exit_code == 1
    assert "NOT exact" in text.output


def test_a_backend_that_breaks_turns_the_command_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(problem, call, out=None):
        raise RuntimeError("device lost")

    monkeypatch.setattr(blocked, "forward", broken)
    code, result = invoke(*FEW, "--dtype", "float32")
    assert code == 1
    assert {(row["status"], row["reason"]) for row in result["rows"]} == {("error", "RuntimeError: device lost")}


def test_a_refusal_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def supports(problem: Problem) -> str | None:
        return "sinks are not served" if problem.sinks else None

    monkeypatch.setattr(blocked, "supports", supports)
    monkeypatch.setattr(execution, "choose", dispatch.choose.__wrapped__)  # what it chose before is remembered
    code, result = invoke(*FEW, "--dtype", "float32")
    assert code == 0
    assert result["counts"]["refused"] > 0
    assert all(("sinks" in row["case"]) == (row["status"] == "refused") for row in result["rows"])


def test_random_cases_are_repeatable_and_differ() -> None:
    first, second = ([random_case(random.Random(seed), index) for index in range(30)] for seed in (1, 1))
    assert first == second
    assert random_case(random.Random(2), 0) != first[0]


def test_random_cases_are_exact_and_use_every_feature() -> None:
    generator = random.Random(7)
    drawn = [random_case(generator, index) for index in range(200)]
    for name in ("mask", "alibi", "bias", "q_lens", "softcap", "sinks", "dropout_p", "v_dim", "dlse", "deterministic"):
        assert any(getattr(case, name) for case in drawn), name
    arguments = ["verify", "--case", "gqa", "--random", "12", "--seed", "3", "--device", "cpu", "--dtype", "float32"]
    code, result = invoke(*arguments, "--backend", "reference")
    assert code == 0, [row["reason"] for row in result["rows"] if row["status"] != "ok"]
    assert sum(row["case"].startswith("random-") for row in result["rows"]) == 12


def test_real_cases_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "REAL_CASES", (Case("real-small", "stands for the large ones", q_len=20, k_len=20),))
    code, result = invoke("verify", "--real", "--device", "cpu", "--backend", "blocked", "--dtype", "float32")
    assert (code, [row["case"] for row in result["rows"]]) == (0, ["real-small"])


def test_the_table_can_be_read() -> None:
    text = CliRunner().invoke(app, [*FEW, "--dtype", "float32"])
    assert text.exit_code == 0
    for part in ("blocked, float32", "PyTorch's own", "dsinks", "exact", "used"):
        assert part in text.output


def test_one_subprocess_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flashtile", *FEW, "--dtype", "float32", "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
