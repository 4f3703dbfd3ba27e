"""benchmarks/versions.py: versions of the package side by side, each judged and timed by `bench`."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from flashtile.cli import roster

ROOT = Path(__file__).parent.parent
QUICK = ["--quick", "--lengths", "64", "--dims", "16", "--causal", "--seconds", "0.01", "--device", "cpu"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module; what it adds to the peers and to the import path is gone afterwards."""
    monkeypatch.setattr(roster, "OTHERS", dict(roster.OTHERS))
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("versions", ROOT / "benchmarks" / "versions.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of the script."""
    monkeypatch.setattr(sys, "argv", ["versions.py", *words])
    with pytest.raises(SystemExit) as ended:
        script.main()
    code = ended.value.code
    return code if isinstance(code, int) else 0


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_version_is_timed_beside_this_one(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    folder = f"twin={ROOT / 'src'}"
    assert run(script, monkeypatch, folder, "--", *QUICK, "--out", str(out)) == 0
    found = rows(out)
    assert [(row["peer"], row["mode"]) for row in found] == [
        (peer, mode) for mode in ("forward", "backward") for peer in ("flashtile", "twin")
    ]
    assert all(row["status"] == "measured" and row["gate"] and row["ms"] > 0 for row in found)
    assert sys.modules["flashtile_twin"].attention is not sys.modules["flashtile"].attention
    assert torch.ops.flashtile_twin.forward is not torch.ops.flashtile.forward


def test_a_wrong_version_is_not_timed(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package, out = tmp_path / "flashtile", tmp_path / "rows.jsonl"
    package.mkdir()
    (package / "__init__.py").write_text("from flashtile.wrong import attention", "utf-8")
    (package / "wrong.py").write_text("def attention(q, k, v, **options):\n    return q + k + v\n", "utf-8")
    assert run(script, monkeypatch, f"wrong={tmp_path}", "--", *QUICK, "--mode", "forward", "--out", str(out)) == 1
    ours, theirs = rows(out)
    assert ours["status"] == "measured"
    assert theirs["status"] == "wrong" and "ms" not in theirs


@pytest.mark.parametrize(
    ("word", "expected"),
    [*((word, "NAME=FOLDER") for word in ("src", "=src", "before=", "be-fore=src")), ("before=/nowhere", "a folder")],
)
def test_what_names_no_version_is_a_usage_error(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str, expected: str
) -> None:
    assert run(script, monkeypatch, word, "--", *QUICK) == 2
    assert f"got {word!r}, expected {expected}" in capsys.readouterr().err
