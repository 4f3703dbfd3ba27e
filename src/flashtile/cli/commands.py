"""The Typer application: the options, the computation and the print of each command come from its own module."""

from __future__ import annotations

from typing import Annotated

import typer

from flashtile.cli import bench, demo, doctor, explain, run, verify
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


@app.command(
    "run",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    help="Run a script, or a module after -m, with `import flash_attn` served by flashtile.",
)
def run_program(program: Annotated[list[str], typer.Argument(help="SCRIPT or -m MODULE, and its arguments.")]) -> None:
    """What `flashtile run` does when it comes through Typer; the entry point goes to `run` directly."""
    try:
        run.run(program)
    except run.NothingToRunError as error:
        raise typer.BadParameter(str(error)) from None
