"""Runs the parts of the demo one after the other, judges them, writes the report and shows the summary."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from flashtile.cli import console, machine
from flashtile.cli.console import Result, Step
from flashtile.cli.demo import exactness, plots, report, scaling, settings, text, training
from flashtile.cli.demo.attentions import TITLES
from flashtile.cli.options import option

PARTS = {"exactness": "1/3 exactness", "scaling": "2/3 time and memory", "training": "3/3 training"}


@dataclass(frozen=True)
class Options:
    text: str | None = option(None, "File that the GPT learns; default: the sources of Python's standard library.")
    out: str = option("flashtile-report", "Folder of the report.")
    quick: bool = option(False, "Much smaller in everything, for a first look; not for figures.")


def run(options: Options) -> Result:
    """Runs the demo and writes report.html, report.json and the plots.

    Returns all that was measured, as plain JSON values; `ok` is False where any of `checks` failed. Raises UsageError
    for a text that cannot be read or is too short.
    """
    started = time.perf_counter()
    device = machine.default_device()
    chosen = settings.choose(device, options.quick)
    content = text.read(options.text, chosen.training.context + 1)
    dtype = scaling.fastest_dtype(device)
    # float16 would need its losses scaled; models are trained in bfloat16 where the machine is fast at it.
    trained_in = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    result: Result = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "quick": options.quick,
        "device": machine.device_facts(device),
        "versions": machine.versions(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "part_seconds": {},
    }
    with _part(result, "exactness", exactness.steps(chosen.exactness)) as step:
        result["exactness"] = exactness.run(chosen.exactness, device, step)
    with _part(result, "scaling", scaling.steps(chosen.scaling)) as step:
        result["scaling"] = scaling.run(chosen.scaling, device, dtype, step)
    with _part(result, "training", chosen.training.steps) as step:
        result["training"] = training.run(chosen.training, content, device, trained_in, step)
    result["checks"] = checks(result)
    result["ok"] = all(check["ok"] for check in result["checks"])
    result["seconds"] = time.perf_counter() - started
    return write(console.strict(result), Path(options.out))


@contextmanager
def _part(result: Result, name: str, units: int) -> Iterator[Step]:
    """The progress bar of one part; its duration goes to the result."""
    started = time.perf_counter()
    with console.progress(PARTS[name], units) as step:
        yield step
    result["part_seconds"][name] = time.perf_counter() - started


def checks(result: Result) -> list[Result]:
    """What must hold for the demo to pass."""
    rows = result["exactness"]["rows"]
    wrong = [f"{row['case']} {row['dtype']}" for row in rows if not row["ok"]]
    shares = [row["share"] for row in rows if row["share"] is not None]
    difference = result["training"]["differences"]["flashtile"]
    return [
        {
            "name": "exact forward and gradients",
            "ok": not wrong,
            "detail": f"wrong: {', '.join(wrong)}"
            if wrong
            else f"{len(rows)} cases; the worst uses {max(shares):.0%} of its error budget",
        },
        {
            "name": "same first gradient",
            "ok": difference["gradient_ok"],
            "detail": f"differs from standard attention's by {difference['first_gradient']:.1e} of its length, "
            f"allowed {difference['first_gradient_tolerance']:.0e}",
        },
        {
            "name": "loss curves coincide",
            "ok": difference["curves_ok"],
            "detail": f"largest difference {difference['largest_loss_gap']:.1e} nats a byte "
            f"(step {difference['largest_loss_gap_step']}), held-out {difference['held_out_gap']:.1e}, "
            f"allowed {difference['loss_tolerance']:.2g}",
        },
    ]


def write(result: Result, out: Path) -> Result:
    """Writes all files of the report; returns the result with their paths."""
    out.mkdir(parents=True, exist_ok=True)
    images = plots.draw(result)
    for name, themes in images.items():
        (out / f"{name}.png").write_bytes(themes[plots.LIGHT.name])
    (out / "report.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    page = out / "report.html"
    page.write_text(report.page(result, images), encoding="utf-8")
    return result | {"report": str(page.resolve())}


def show(result: Result) -> None:
    """The summary: checks, costs at the longest common length, the training runs, and where the report lies."""
    screen = Console()
    for check in result["checks"]:
        mark = "[green]passed[/green]" if check["ok"] else "[bold red]FAILED[/bold red]"
        screen.print(f"{mark}  {check['name']}: {check['detail']}")
    for mode in scaling.MODES:
        screen.print(_scaling_table(result, mode))
    screen.print(_training_table(result))
    screen.print(f"{result['seconds']:.0f} s; the report: [bold]{result['report']}[/bold]", soft_wrap=True)


def _scaling_table(result: Result, mode: str) -> Table:
    shape = result["scaling"]["settings"]
    table = Table(
        title=f"causal {scaling.MODES[mode]}, batch {shape['batch']}, {shape['heads']} heads of {shape['dim']}, "
        f"{result['scaling']['dtype']}: time and peak memory",
        title_justify="left",
    )
    table.add_column("tokens", justify="right")
    for title in TITLES.values():
        table.add_column(title, justify="right")
    for length in shape["lengths"]:
        cells = [_cost(report.find(result, name, mode, length)) for name in TITLES]
        table.add_row(str(length), *cells)
    return table


def _cost(row: Result) -> str:
    if row["milliseconds"] is None:
        return "[dim]left out[/dim]"
    memory = "" if row["peak_bytes"] is None else f"  {console.size(row['peak_bytes']):>8}"
    return console.milliseconds(row["milliseconds"]["median"]) + memory


def _training_table(result: Result) -> Table:
    trained = result["training"]
    table = Table(
        title=f"GPT of {console.number(trained['parameters'])} parameters, {trained['settings']['steps']} steps, "
        f"context {trained['settings']['context']}, {trained['dtype']}",
        title_justify="left",
    )
    for heading in ("trained with", "a step", "peak memory", "last loss", "held-out loss"):
        table.add_column(heading, justify="left" if heading == "trained with" else "right")
    for name, one in trained["runs"].items():
        memory = "-" if one["peak_bytes"] is None else console.size(one["peak_bytes"])
        losses = f"{float(one['losses'][-1]):.4f}", f"{float(one['held_out_loss']):.4f}"
        table.add_row(TITLES[name], console.milliseconds(one["step_milliseconds"]), memory, *losses)
    return table
