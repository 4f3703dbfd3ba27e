"""`flashtile verify`: named and random calls on each backend against float64, forward and every gradient."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import torch

from flashtile import dispatch
from flashtile.cli import machine
from flashtile.cli.console import Result, UsageError, choices, progress
from flashtile.cli.options import option
from flashtile.cli.random_cases import random_case
from flashtile.cli.verify_view import show
from flashtile.testing import CASES, Case, WrongResultError, run_case
from flashtile.testing.real_cases import REAL_CASES

__all__ = ["Options", "run", "show"]

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}


@dataclass(frozen=True)
class Options:
    case: str | None = option(None, "Only named cases whose id contains one of these comma-separated words.")
    real: bool = option(False, "The cases at the sizes of real models instead; for a GPU.")
    random: int = option(0, "Random cases on top.")
    seed: int = option(0, "Seed of the random cases and of all values.")
    backend: str | None = option(None, "Backends, comma-separated; default: each that runs on the device.")
    dtype: str = option("float32,bfloat16", "float16, bfloat16, float32, float64, comma-separated.")
    device: str | None = option(None, "cuda, cpu, ...; default: the accelerator if there is one.")
    forward_only: bool = option(False, "Leave the gradients out.")
    quick: bool = option(False, "Only cases that are small enough for Triton's interpreter.")


def run(options: Options) -> Result:
    """Runs every case; `ok` is false where a result is outside of its error budget or a backend fails."""
    device = options.device or machine.default_device()
    machine.check_device(device)
    dtypes = choices(options.dtype, tuple(DTYPES), "--dtype")
    cases = _cases(options)
    backends = _backends(options, device, dtypes)
    tasks = [(case, name, dtype) for name in backends for dtype in dtypes for case in cases]
    rows: list[Result] = []
    with progress("verify", len(tasks)) as step:
        for case, name, dtype in tasks:
            step(f"{name} {dtype} {case.id}")
            rows.append(_check(case, name, dtype, device, options))
            step("", 1)
    counts = {status: sum(row["status"] == status for row in rows) for status in ("ok", "wrong", "error", "refused")}
    return {
        "ok": not (counts["wrong"] or counts["error"]),
        "device": device,
        "seed": options.seed,
        "counts": counts,
        "rows": rows,
    }


def _cases(options: Options) -> list[Case]:
    words = [word.strip() for word in (options.case or "").split(",") if word.strip()]
    table = REAL_CASES if options.real else CASES
    named = [case for case in table if not words or any(word in case.id for word in words)]
    if not named:
        raise UsageError(f"--case: got {options.case!r}, which no named case contains")
    if options.random < 0:
        raise UsageError(f"--random: got {options.random}, expected 0 or more")
    generator = random.Random(options.seed)
    cases = named + [random_case(generator, index) for index in range(options.random)]
    return [case for case in cases if case.small] if options.quick else cases


def _backends(options: Options, device: str, dtypes: list[str]) -> list[str]:
    """The backends asked for, or each that serves a plain call on this device in one of the dtypes."""
    if options.backend is not None:
        return choices(options.backend, dispatch.BACKENDS, "--backend")
    plain = [machine.plain_problem(device, DTYPES[dtype]) for dtype in dtypes]
    return [name for name in dispatch.BACKENDS if any(dispatch.load(name).supports(p) is None for p in plain)]


def _check(case: Case, backend: str, dtype: str, device: str, options: Options) -> Result:
    row: Result = {"case": case.id, "backend": backend, "dtype": dtype, "status": "ok", "reason": None, "errors": {}}
    started = time.perf_counter()
    try:
        report = run_case(case, backend, DTYPES[dtype], device, options.seed, grads=not options.forward_only)
    except NotImplementedError as error:
        row.update(status="refused", reason=str(error))
    except WrongResultError as error:
        row.update(status="wrong", reason=str(error))
    except Exception as error:
        # One broken call must not hide what the others do.
        row.update(status="error", reason=f"{type(error).__name__}: {error}")
    else:
        row["share"] = report.share
        row["errors"] = {
            error.name: {"error": error.worst, "plain": error.plain, "allowed": error.allowed, "share": error.share}
            for error in report.errors
        }
    row["seconds"] = time.perf_counter() - started
    return row
