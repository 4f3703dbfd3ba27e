"""What `flashtile verify` prints."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from flashtile.cli.console import Result

ORDER = ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks")


def show(result: Result) -> None:
    """For each backend and dtype the worst error of each result beside PyTorch's own; then whatever is wrong."""
    screen = Console()
    for key, rows in _by_run(result["rows"]).items():
        screen.print(_table(key, rows))
    for row in result["rows"]:
        if row["status"] in ("wrong", "error"):
            where = f"{row['backend']} {row['dtype']} [bold]{row['case']}[/]"
            screen.print(f"[bold red]{row['status']}[/]  {where}: ", end="")
            screen.print(row["reason"], markup=False, highlight=False)
    refused: dict[tuple[str, str], int] = defaultdict(int)
    for row in result["rows"]:
        if row["status"] == "refused":
            refused[row["backend"], row["reason"].rpartition(": ")[2]] += 1
    for (backend, reason), count in refused.items():
        screen.print(f"{backend} refused {count} cases: {reason}", style="dim", markup=False, highlight=False)
    counts = result["counts"]
    colour, word = ("green", "exact") if result["ok"] else ("red", "NOT exact")
    checked = counts["ok"] + counts["wrong"] + counts["error"]
    screen.print(f"[bold {colour}]{word}[/]: {counts['ok']} of {checked} calls within their error budget")


def _by_run(rows: list[Result]) -> dict[tuple[str, str], list[Result]]:
    runs: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for row in rows:
        if row["status"] != "refused":
            runs[row["backend"], row["dtype"]].append(row)
    return runs


def _table(key: tuple[str, str], rows: list[Result]) -> Table:
    """The row of each result is the case that uses most of its error budget."""
    backend, dtype = key
    good = [row for row in rows if row["status"] == "ok"]
    title = f"{backend}, {dtype}: {len(good)} of {len(rows)} cases exact"
    table = Table(title=title, title_justify="left")
    table.add_column("result")
    for heading in ("error", "PyTorch's own", "allowed", "used"):
        table.add_column(heading, justify="right")
    table.add_column("worst in case")
    for name in ORDER:
        having = [row for row in good if name in row["errors"]]
        if having:
            worst = max(having, key=lambda row: row["errors"][name]["share"])
            entry = worst["errors"][name]
            numbers = (f"{entry[column]:.2e}" for column in ("error", "plain", "allowed"))
            table.add_row(name, *numbers, f"{entry['share']:.0%}", worst["case"])
    return table
