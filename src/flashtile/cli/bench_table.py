"""The tables that `flashtile bench` prints of its rows."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from flashtile.cli.console import Result, size

WIDE = 160
GIGA_BELOW = 2.0  # where all speeds are below this many TFLOP/s, they read better as GFLOP/s


def show(result: Result) -> None:
    """One table of speeds and one of memory for each mode, then the reasons of those left out."""
    screen = Console()
    if not screen.is_terminal:
        screen = Console(width=WIDE)
    if "plots" in result:
        for path in result["plots"]:
            screen.print(path)
        return
    rows = result["rows"]
    first = rows[0]
    limits = first["limits"]
    screen.print(
        f"[bold]{first['device']['name']}[/], {first['dtype']}: matmul {limits['matmul_tflops']:.4g} TFLOP/s, "
        f"copy {limits['copy_gbps']:.4g} GB/s"
    )
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    for mode in modes:
        chosen = [row for row in rows if row["mode"] == mode]
        screen.print(_speeds(chosen, mode))
        # A backward's memory is that of forward and backward together, which train's table shows.
        repeated = mode == "backward" and "train" in modes
        if not repeated and any(row.get("extra_bytes") is not None for row in chosen):
            screen.print(_memory(chosen, mode))
    _reasons(screen, rows)
    if result["out"]:
        screen.print(f"{len(rows)} rows appended to {result['out']}")
    if not result["ok"]:
        screen.print(f"[bold red]{result['failed']} rows failed[/]")


def _by_case(rows: list[Result]) -> dict[str, dict[str, Result]]:
    table: dict[str, dict[str, Result]] = defaultdict(dict)
    for row in rows:
        table[row["case"]][row["peer"]] = row
    return table


def _present(rows: list[Result]) -> list[str]:
    """The peers that did something in some row."""
    return list(dict.fromkeys(row["peer"] for row in rows if row["own"] or row["status"] != "refused"))


def _speeds(rows: list[Result], mode: str) -> Table:
    measured = [row for row in rows if row["status"] == "measured"]
    if mode == "host":
        key, unit, factor, best_of = "host_us", "microseconds of host time a call", 1.0, min
    elif max((row["tflops"] for row in measured), default=GIGA_BELOW) < GIGA_BELOW:
        key, unit, factor, best_of = "tflops", "GFLOP/s, and milliseconds", 1e3, max
    else:
        key, unit, factor, best_of = "tflops", "TFLOP/s, and milliseconds", 1.0, max
    peers = _present(rows)
    table = _table(f"{mode}: {unit}", peers)
    for case, of_peer in _by_case(rows).items():
        values = [row[key] for row in of_peer.values() if row["status"] == "measured"]
        best = best_of(values) if values else None
        table.add_row(case, *(_speed_cell(of_peer.get(peer), key, factor, best) for peer in peers))
    return table


def _table(title: str, peers: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("call", overflow="fold")
    for peer in peers:
        table.add_column(peer, justify="right", overflow="fold")
    return table


def _speed_cell(row: Result | None, key: str, factor: float, best: float | None) -> str:
    if row is None or row["status"] == "refused":
        return "[dim]-[/]"
    if row["status"] != "measured":
        return f"[bold red]{row['status']}[/]"
    value = row[key] * factor
    text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    text = f"[bold green]{text}[/]" if row[key] == best else text
    return text if key == "host_us" else f"{text} [dim]{row['ms']:.3g}[/]"


def _memory(rows: list[Result], mode: str) -> Table:
    what = "forward" if mode == "forward" else "forward and backward"
    peers = _present(rows)
    table = _table(f"{what}: peak memory beyond inputs and results", peers)
    for case, of_peer in _by_case(rows).items():
        held = (of_peer.get(peer, {}).get("extra_bytes") for peer in peers)
        table.add_row(case, *("[dim]-[/]" if value is None else size(value) for value in held))
    return table


def _reasons(screen: Console, rows: list[Result]) -> None:
    """Who was left out of how many rows, and why; errors and wrong results first."""
    counts: dict[tuple[bool, str, str, str], int] = defaultdict(int)
    for row in rows:
        if row["status"] != "measured":
            counts[row["status"] == "refused", row["peer"], row["status"], row["reason"]] += 1
    for (refused, peer, status, reason), count in sorted(counts.items()):
        style = "dim" if refused else "red"
        text = f"{peer} {status} in {count} of {len(rows)} rows: {reason}"
        screen.print(text, style=style, markup=False, highlight=False)
