"""examples/long_document.py: its rows, what it says that it cannot measure, and its check against float64."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from law import PACKAGE

import examples

SCRIPT = examples.FOLDER / "long_document.py"


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is not measured there")
@pytest.mark.parametrize("train", [False, True])
def test_as_a_user_runs_it(train: bool, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_bytes(SCRIPT.read_bytes() * 10)
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--length", "512", "--window", "64", "--steps", "2"]
    command += ["--text", str(book)]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *(["--train"] if train else [])], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    first, head, *rows, gap, full, window = done.stdout.splitlines()
    assert first.startswith("forward and backward of" if train else "forward of")
    assert re.findall(r"standard|flashtile|window 64", head) == ["standard", "flashtile", "window 64"]
    assert [int(row.split()[0]) for row in rows] == [256, 512]
    assert all(row.count(" ms ") + row.count(" us ") == 3 for row in rows)
    assert float(re.search(r"by (\S+) nats", gap)[1]) < 1e-5
    for line in (full, window):
        assert float(re.search(r"within (\S+) of float64", line)[1]) < 1e-5


def test_what_standard_attention_would_need_is_said() -> None:
    example = examples.load("long_document")
    chosen = example.options(["--device", "cpu"])
    before = {"length": 10, "seconds": 1.0, "bytes": 2**30, "loss": 5.5, "needed": None, "error": 0.0}
    row = example.measure(chosen, "standard", 1000, before)
    assert (row["seconds"], row["needed"]) == (None, 2**30 * 10_000)
    assert "needs 9.766 TiB" in example.show("standard", row)
    assert example.measure(chosen, "standard", 2000, row)["needed"] == 4 * row["needed"]


def test_a_wrong_row_is_found() -> None:
    example = examples.load("long_document")
    reading = example.Reading(example.options(["--device", "cpu", "--length", "64"]), "flashtile", 64)
    reading()
    right = example.largest_error(reading, None)
    q, k, v, out = reading.seen
    reading.seen = [q, k, v, torch.roll(out, 1, 1)]
    assert right < 1e-5 < 1e-2 < example.largest_error(reading, None)


def test_a_length_too_short_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        examples.load("long_document").main(["--length", "8"])
    assert ended.value.code == 2
    assert "--length: got 8, expected enough to be halved" in capsys.readouterr().err
