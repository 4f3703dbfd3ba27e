"""examples/train_gpt.py: the same losses with each attention, alone and spread over two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from law import PACKAGE

import examples

SMALL = ["--device", "cpu", "--layers", "1", "--heads", "2", "--width", "32", "--context", "64"]


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    """Four steps of each attention with two windows a step."""
    main = examples.load("train_gpt").main
    names = ("standard", "sdpa", "flashtile")
    return {name: main([*SMALL, "--batch", "2", "--steps", "4", "--attention", name]) for name in names}


def test_every_attention_trains_the_same_model(alone: dict[str, dict[str, Any]]) -> None:
    standard = alone["standard"]
    for name, run in alone.items():
        torch.testing.assert_close(run["losses"], standard["losses"], rtol=1e-4, atol=0)
        assert abs(run["held_out_loss"] - standard["held_out_loss"]) < 1e-3
        assert run["tokens_per_second"] > 0
        assert run["attention"] == name
    assert standard["losses"][-1] < standard["losses"][0]


def test_two_ranks_are_one_with_the_whole_batch(alone: dict[str, dict[str, Any]]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(examples.FOLDER / "train_gpt.py"), *SMALL, "--batch", "1", "--steps", "4", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *script], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["ranks"] == 2
    torch.testing.assert_close(result["losses"], alone["flashtile"]["losses"], rtol=1e-4, atol=0)


def test_it_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    examples.load("train_gpt").main([*SMALL, "--batch", "1", "--steps", "2", "--dtype", "bfloat16"])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "flashtile attention" in first
    assert "standard library" in first
    assert "tokens per second, held-out loss" in last


def test_a_wrong_attention_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        examples.load("train_gpt").main(["--attention", "abacus"])
    assert ended.value.code == 2
    assert "invalid choice: 'abacus'" in capsys.readouterr().err
