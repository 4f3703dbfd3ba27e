"""The Typer application: the options, the computation and the print of each command come from its own module."""

from __future__ import annotations

import typer

from flashtile.cli import bench, demo, doctor, explain, verify
from flashtile.cli.options import command

app = typer.Typer(
    name="flashtile",
    help="Exact, IO-aware attention: check, measure and explain it on this machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

COMMANDS = (
    ("demo", demo, "Check exactness, compare time and memory, and train a small GPT; ends with a report."),
    ("doctor", doctor, "What this machine has, which backend serves what, and what does not fit together."),
    ("verify", verify, "Compare every backend with float64, forward and all gradients."),
    ("bench", bench, "Time flashtile and its peers, each behind a correctness gate."),
    ("explain", explain, "What one call would do: backend, tiles, operations, memory traffic, expected bound."),
)
for name, module, text in COMMANDS:
    app.command(name)(command(module.Options, module.run, module.show, text))
