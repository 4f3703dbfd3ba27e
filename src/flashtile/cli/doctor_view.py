"""What `flashtile doctor` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flashtile.cli.console import Result, size

MARKS = {"error": "[bold red]error[/]", "warning": "[yellow]warning[/]"}


def show(result: Result) -> None:
    """Machine and versions, who serves what, what does not fit, and how the small runs went."""
    screen = Console()
    for device in result["devices"]:
        screen.print(f"[bold]{device['type']}[/]  {device['name']}{_details(device)}", highlight=False)
    installed = [f"{name} {version}" for name, version in result["versions"].items() if version is not None]
    commit = "" if result["commit"] is None else f", commit {result['commit']}"
    screen.print(f"{', '.join(installed)}{commit}", highlight=False)
    missing = [name for name, reason in result["peers"].items() if reason is not None]
    absent = ", ".join(missing) or "none"
    screen.print(f"peers of bench that cannot be imported: {absent}", style="dim", highlight=False)
    screen.print()
    for note in result["mismatches"]:
        screen.print(f"{MARKS[note['level']]}  ", end="")
        screen.print(note["text"], markup=False, highlight=False)
    if not result["mismatches"]:
        screen.print("[green]ok[/]  the versions fit together")
    screen.print()
    screen.print(_backends(result["serves"]))
    screen.print()
    screen.print(_runs(result["runs"]))
    screen.print("[bold green]all is well[/]" if result["ok"] else "[bold red]something does not work[/]")


def _details(device: Result) -> str:
    parts = []
    if "capability" in device:
        parts.append(f"capability {'.'.join(map(str, device['capability']))}")
        parts.append(f"{device['processors']} processors")
        parts.append(f"driver {device['driver'] or 'unknown'}")
    if "cores" in device:
        parts.append(f"{device['cores']} cores, threads used: {device['threads']}, {device['vector']}")
    if device.get("memory_bytes"):
        parts.append(size(device["memory_bytes"]))
    return "".join(f", {part}" for part in parts)


def _backends(serves: dict[str, Result]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for device, backends in serves.items():
        for name, refusals in backends.items():
            lines = [f"not {_summary(requests)}: {sentence}" for sentence, requests in refusals.items()]
            answer = Text("\n".join(lines)) if lines else Text("serves every call", style="green")
            table.add_row(device, Text(name, style="bold"), answer)
    return table


def _summary(requests: list[str]) -> str:
    """A few words for the requests that one sentence answers."""
    dtypes = list(dict.fromkeys(request.rpartition(", ")[2] for request in requests))
    kinds = list(dict.fromkeys(request.rpartition(", ")[0] for request in requests))
    if len(kinds) > 5:
        return "any call" if len(dtypes) == 4 else f"{' or '.join(dtypes)}"
    return " or ".join(kinds) if len(dtypes) == 4 else f"{' or '.join(kinds)} in {' or '.join(dtypes)}"


def _runs(runs: list[Result]) -> Table:
    table = Table(title="a small call, forward and backward, against float64", title_justify="left")
    for heading in ("device", "backend", "dtype", "result"):
        table.add_column(heading, overflow="fold")
    table.add_column("seconds", justify="right")
    for entry in runs:
        if entry["ok"]:
            answer = Text.assemble(("exact", "green"), f", {entry['share']:.0%} of the error budget")
        else:
            answer = Text(entry["error"], style="red")
        table.add_row(entry["device"], entry["backend"], entry["dtype"], answer, f"{entry['seconds']:.2f}")
    return table
