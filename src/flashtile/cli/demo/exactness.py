"""Forward and every gradient against float64, for a choice of the cases that the tests use, on the default backend."""

from __future__ import annotations

from dataclasses import asdict

import torch

from flashtile.cli import machine
from flashtile.cli.console import Result, Step
from flashtile.cli.demo.settings import Exactness
from flashtile.cli.workload import Workload
from flashtile.dispatch import choose
from flashtile.masks import Causal
from flashtile.testing import Case, build, case, evaluate
from flashtile.testing.run import compare


def run(settings: Exactness, device: str, step: Step) -> Result:
    """One row for each case and dtype: the errors, beside those of plain PyTorch in the same dtype."""
    rows = []
    for entry in cases(settings):
        for name in settings.dtypes:
            step(f"{entry.id}, {name}")
            rows.append(_row(entry, name, device))
            step("", advance=1)
    return {"settings": asdict(settings), "rows": rows}


def steps(settings: Exactness) -> int:
    """How many units of progress `run` reports."""
    return len(cases(settings)) * len(settings.dtypes)


def cases(settings: Exactness) -> list[Case]:
    """The named cases, and plain causal calls of the given lengths."""
    why = "the call that the rest of the demo makes"
    long = [Case(f"causal-{n}", why, batch=1, q_len=n, k_len=n, dim=64, mask=Causal()) for n in settings.lengths]
    return [case(name) for name in settings.cases] + long


def default_backend(device: str, dtype: torch.dtype) -> str:
    """The backend that flashtile chooses by itself for a plain causal call."""
    plain = Workload("plain", 1, 64, 64, 1, 1, 64, 64, causal=True)
    return choose(plain.problem(dtype, device, machine.capability(device)))


def _row(entry: Case, dtype_name: str, device: str) -> Result:
    """share: the most of its error budget that any result uses; above 1, or without a value, the row is wrong."""
    dtype = getattr(torch, dtype_name)
    backend = default_backend(device, dtype)
    row: Result = {"case": entry.id, "why": entry.why, "dtype": dtype_name, "backend": backend}
    inputs = build(entry, dtype, device)
    try:
        errors = compare(entry, inputs, evaluate(entry, inputs, backend))
    except Exception as problem:  # whatever a call fails with, the other cases are still to be shown
        return row | {"errors": {}, "share": None, "ok": False, "reason": f"{type(problem).__name__}: {problem}"}
    share = max(error.share for error in errors)
    measured = {error.name: {"error": error.worst, "plain": error.plain, "share": error.share} for error in errors}
    return row | {"errors": measured, "share": share, "ok": share <= 1, "reason": None}
