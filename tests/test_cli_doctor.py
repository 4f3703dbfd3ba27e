"""`flashtile doctor`: facts, backends with their sentences, versions that do not fit, a small run on each backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flashtile import dispatch
from flashtile.backends import blocked
from flashtile.cli import doctor
from flashtile.cli.commands import app
from flashtile.problem import Problem

GOOD = {"torch": "2.13.0+cu130", "triton": "3.7.1", "cuda": "13.0", "hip": None}


@pytest.mark.parametrize(
    ("changes", "wanted", "cuda_usable", "has_gpu", "level", "text"),
    [
        ({"torch": "2.9.1+cpu", "cuda": None}, None, False, False, "error", "torch 2.9.1+cpu is older than 2.10"),
        ({"triton": "3.5.1"}, "3.5.1", True, True, "error", "triton 3.5.1 is older than 3.6"),
        ({"triton": "3.6.0"}, "3.7.1", True, True, "warning", "asks for triton 3.7.1, 3.6.0 is installed"),
        ({"triton": None}, "3.7.1", True, True, "warning", "triton is not installed"),
        ({}, "3.7.1", False, False, "warning", "built for CUDA 13.0 but finds no usable GPU"),
        ({"cuda": None, "hip": "7.1"}, "3.7.1", False, False, "warning", "built for ROCm 7.1 but finds no usable GPU"),
        ({"torch": "2.13.0+cpu", "cuda": None}, None, False, True, "warning", "there is an NVIDIA driver, but torch"),
    ],
)
def test_versions_that_do_not_fit_are_named(
    changes: dict[str, str | None], wanted: str | None, cuda_usable: bool, has_gpu: bool, level: str, text: str
) -> None:
    notes = doctor.mismatches(GOOD | changes, wanted, cuda_usable, has_gpu, "Linux")
    assert [note["level"] for note in notes] == [level]
    assert text in notes[0]["text"]


@pytest.mark.parametrize("torch_version", ["2.10.0", "2.13.0+cu130", "3.0.0a1"])
def test_versions_that_fit_are_not(torch_version: str) -> None:
    assert not doctor.mismatches(GOOD | {"torch": torch_version}, "3.7.1", True, True, "Linux")
    cpu = {"torch": "2.13.0+cpu", "cuda": None, "triton": None, "hip": None}
    assert not doctor.mismatches(cpu, None, False, False, "Darwin")


@pytest.mark.parametrize(
    ("requirements", "version"),
    [
        (['triton==3.6.0; platform_system == "Linux"', "sympy>=1.13"], "3.6.0"),
        (["pytorch-triton-rocm==3.4.0"], "3.4.0"),
        (["numpy", "tritonclient==2.0"], None),
        (None, None),
    ],
)
def test_the_triton_that_torch_asks_for(
    requirements: list[str] | None, version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requirements)
    assert doctor.required_triton() == version


def invoke() -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(app, ["doctor", "--device", "cpu", "--json"])
    assert result.exit_code in (0, 1), result.output
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter takes seconds for a call, and its own tests."""
    monkeypatch.setattr(dispatch, "BACKENDS", ("blocked", "reference"))


@pytest.mark.usefixtures("two_backends")
def test_facts_and_runs() -> None:
    code, result = invoke()
    assert (code, result["ok"]) == (0, True)
    assert result["versions"]["torch"] == torch.__version__
    assert result["devices"][0]["type"] == "cpu"
    assert [(run["backend"], run["dtype"]) for run in result["runs"]] == [
        (backend, dtype) for backend in ("blocked", "reference") for dtype in ("bfloat16", "float32")
    ]
    assert all(0 < run["share"] <= 1 for run in result["runs"])
    assert result["serves"]["cpu"] == {"blocked": {}, "reference": {}}


@pytest.mark.usefixtures("two_backends")
def test_sentences_of_a_backend_are_shown_with_what_they_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def supports(problem: Problem) -> str | None:
        return "sinks are not served" if problem.sinks else None

    monkeypatch.setattr(blocked, "supports", supports)
    _, result = invoke()
    asked = result["serves"]["cpu"]["blocked"]["sinks are not served"]
    assert asked == [f"sinks, {dtype}" for dtype in ("float16", "bfloat16", "float32", "float64")]
    text = CliRunner().invoke(app, ["doctor", "--device", "cpu"]).output
    assert "not sinks: sinks are not served" in text
    assert "serves every call" in text


@pytest.mark.usefixtures("two_backends")
@pytest.mark.parametrize("kind", ["wrong", "broken"])
def test_a_bad_backend_turns_the_command_red(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = blocked.forward

    def forward(problem, call, out=None):
        if kind == "broken":
            raise RuntimeError("no kernel image is available\nfor this device")
        result, lse = honest(problem, call, out)
        return result, lse + 0.1

    monkeypatch.setattr(blocked, "forward", forward)
    code, result = invoke()
    assert (code, result["ok"]) == (1, False)
    bad = [run for run in result["runs"] if not run["ok"]]
    assert {run["backend"] for run in bad} == {"blocked"}
    text = "wrong result: lse: error" if kind == "wrong" else "RuntimeError: no kernel image is available"
    assert all(run["error"].startswith(text) for run in bad)


@pytest.mark.usefixtures("two_backends")
def test_an_impossible_version_turns_the_command_red(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OLDEST_TORCH", (99, 0))
    code, result = invoke()
    assert code == 1
    assert result["mismatches"][0]["level"] == "error"


def test_one_subprocess_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flashtile", "doctor", "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Triton runs there only in its interpreter" in " ".join(done.stdout.split())
    assert "all is well" in done.stdout


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [device["type"] for device in found["devices"]] == ["cuda", "cpu"]
    assert {(run["backend"], run["device"]) for run in found["runs"]} >= {("triton", "cuda"), ("blocked", "cpu")}
