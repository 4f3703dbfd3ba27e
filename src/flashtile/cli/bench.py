"""`flashtile bench`: speed and memory of flashtile and its peers, each behind a correctness gate, as JSON rows."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from flashtile.cli import grids, machine, plots, roster
from flashtile.cli.bench_table import show
from flashtile.cli.console import Result, UsageError, choices, integers, progress, strict
from flashtile.cli.limits import Limits, measure
from flashtile.cli.measure import Contest
from flashtile.cli.options import option
from flashtile.cli.workload import Workload

__all__ = ["Options", "run", "show"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MODES = {
    "forward": ("forward",),
    "backward": ("backward",),
    "both": ("forward", "backward"),
    "train": ("train",),
    "host": ("host",),
    "all": ("forward", "backward", "train"),
}

# A call so small that the device is done before the host is: what is left is the host's own time.
TINY = Workload("tiny", batch=1, q_len=64, k_len=64, heads=2, kv_heads=2, qk_dim=64, v_dim=64, causal=True)


@dataclass(frozen=True)
class Options:
    grid: str = option("small", "small, paper (16384 tokens, 2048 hidden units) or models (20 known models).")
    only: str | None = option(None, "Of the grid models: parts of ids, comma-separated.")
    lengths: str | None = option(None, "Sequence lengths instead of the grid's, comma-separated.")
    dims: str | None = option(None, "Head dims instead of the grid's, comma-separated.")
    batch: int | None = option(None, "Batch size instead of the grid's.")
    heads: int | None = option(None, "Query heads instead of the grid's.")
    kv_heads: int | None = option(None, "Key-value heads; default: as many as query heads.")
    causal: bool | None = option(None, "Only causal or only full attention; default: both.", "--causal/--full")
    features: str = option("plain", f"Of {', '.join(grids.FEATURES)}, comma-separated; + joins several.")
    dtype: str | None = option(None, "float16, bfloat16 or float32; default: bfloat16.")
    mode: str = option("both", "forward, backward, both, train (forward and backward at once), all, or host.")
    device: str | None = option(None, "cuda, cpu, ...; default: the accelerator if there is one.")
    backend: str | None = option(None, "Backends of flashtile, comma-separated; default: its own choice.")
    peers: str = option("all", "all, none, or names, comma-separated.")
    seconds: float = option(0.2, "Time spent on each measurement.")
    out: str | None = option(None, "Append the rows to this file, one JSON object a line.")
    plot: str | None = option(None, "Measure nothing: draw the rows of this file.")
    plot_out: str = option("plots", "Folder for the plots.")
    commit: str | None = option(None, "What the rows name as the commit; default: the checkout's.")
    seed: int = option(0, "Seed of the inputs.")
    quick: bool = option(False, "Tiny sizes, to try the command; not for figures.")


def run(options: Options) -> Result:
    """Measures the grid; `ok` is false where a gate failed or flashtile raised an error."""
    if options.plot is not None:
        return {"ok": True, "plots": [str(path) for path in plots.draw(Path(options.plot), Path(options.plot_out))]}
    modes = MODES[choices(options.mode, tuple(MODES), "--mode")[0]]
    device = options.device or machine.default_device()
    machine.check_device(device)
    if not 0 < options.seconds < float("inf"):
        raise UsageError(f"--seconds: got {options.seconds}, expected a positive number")
    dtype = DTYPES[choices(options.dtype or "bfloat16", tuple(DTYPES), "--dtype")[0]]
    works = [replace(TINY, train=False)] if modes == ("host",) else _grid(options)
    peers = roster.selected(options.peers, options.backend)
    if not any(work.train for work in works) and not {"forward", "host"} & set(modes):
        raise UsageError(f"--mode: got {options.mode!r}, but these calls have a forward only")
    with progress("bench", len(works) + 1) as step:
        step("the machine's own limits")
        facts = _facts(options, device, dtype)
        limits = Limits(**facts["limits"])
        step("", 1)
        rows: list[Result] = []
        for work in works:
            own_modes = tuple(mode for mode in modes if work.train or mode in ("forward", "host"))
            contest = Contest(work, own_modes, device, dtype, limits, options.seconds, options.seed)
            compared = contest.rows(peers, step)
            clocks = machine.clocks(device)
            measured = [{**row, **facts, "clocks": clocks} for row in compared]
            _append(options.out, measured)
            rows += measured
            step("", 1)
    failed = [row for row in rows if row["status"] == "wrong" or (row["own"] and row["status"] == "error")]
    return {"ok": not failed, "rows": rows, "failed": len(failed), "out": options.out}


def _grid(options: Options) -> list[Workload]:
    shaping = ("lengths", "dims", "batch", "heads", "kv_heads", "causal")
    if options.grid == "models":
        given = [name for name in shaping if getattr(options, name) is not None]
        if given or options.features != "plain":
            raise UsageError(f"--grid models: got --{(given or ['features'])[0]} too, but these calls are fixed")
        return grids.model_grid(options.only)
    if options.only is not None:
        raise UsageError(f"--only: got {options.only!r}, which picks from --grid models")
    grid = choices(options.grid, grids.GRIDS, "--grid")[0]
    return grids.sequence_grid(
        "quick" if options.quick else grid,
        lengths=None if options.lengths is None else integers(options.lengths, "--lengths"),
        dims=None if options.dims is None else integers(options.dims, "--dims"),
        causal=options.causal,
        features=grids.check_features(options.features),
        batch=options.batch,
        heads=options.heads,
        kv_heads=options.kv_heads,
    )


def _facts(options: Options, device: str, dtype: torch.dtype) -> Result:
    return {
        "grid": "quick" if options.quick else options.grid,
        "limits": measure(dtype, device, options.seconds, options.quick).as_dict(),
        "device": machine.device_facts(device),
        "versions": machine.versions(),
        "commit": options.commit or machine.commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": options.seed,
    }


def _append(path: str | None, rows: list[Result]) -> None:
    if path is None:
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(strict(row), allow_nan=False) + "\n" for row in rows)
