"""What `flashtile explain` prints."""

from __future__ import annotations

from rich.columns import Columns
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from flashtile.cli.console import Result, milliseconds, number, size

TILE_LOOKS = {".": ("··", "bright_black"), "P": ("▒▒", "yellow"), "F": ("██", "green")}


def show(result: Result) -> None:
    """The choice, the tiles with their picture, operations, traffic and the expected bound."""
    screen = Console()
    screen.print(f"[bold]{result['problem']}[/]", highlight=False)
    for name, reason in result["backends"].items():
        if name == result["backend"]:
            screen.print(f"  [bold green]{name}[/]  chosen")
        else:
            screen.print(f"  [dim]{name}[/]  ", end="")
            screen.print("can too" if reason is None else reason, style="dim", markup=False, highlight=False)
    if result["backend"] is None:
        screen.print("[bold red]no backend serves this call[/]")
    pictures: dict[tuple[int, int], list[Result]] = {}
    for kernel in result["kernels"]:
        pictures.setdefault((kernel["block_m"], kernel["block_n"]), []).append(kernel)
    screen.print()
    screen.print(Columns([_tiles(kernels) for kernels in pictures.values()], padding=(0, 4)))
    if pictures:
        screen.print(_legend())
    screen.print(_costs(result))
    screen.print(_sentences(result), highlight=False)


def _tiles(kernels: list[Result]) -> Group:
    """Kernels of the same tile share one picture."""
    first = kernels[0]
    counts = first["tiles"]
    lines = [Text(f"{first['block_m']} query rows x {first['block_n']} keys", style="bold")]
    for kernel in kernels:
        settings = ", ".join(f"{key} {value}" for key, value in kernel["settings"].items())
        programs = f"{number(kernel['programs'])} programs"
        lines.append(Text(f"{kernel['name']}: {', '.join(filter(None, (programs, settings)))}"))
        if kernel["resources"] is not None:
            needs = kernel["resources"]
            spilled = f"{needs['spills']} bytes spilled" if needs["spills"] else "no spills"
            memory = f"{size(needs['shared'])} shared memory"
            lines.append(Text(f"  {needs['registers']} registers, {spilled}, {memory}", style="dim"))
    lines.append(Text(f"tiles a head: {counts['full']} full, {counts['partial']} partial, {counts['skipped']} skipped"))
    for row in first["picture"]:
        line = Text()
        for letter in row:
            line.append(*TILE_LOOKS[letter])
        lines.append(line)
    return Group(*lines)


def _legend() -> Text:
    legend = Text()
    for letter, meaning in (("F", "full: no masking"), ("P", "partial or mixed"), (".", "skipped: never loaded")):
        legend.append(*TILE_LOOKS[letter])
        legend.append(f" {meaning}   ")
    legend.append("rows are queries, columns keys\n", style="dim")
    return legend


def _costs(result: Result) -> Table:
    table = Table(title="slow-memory traffic of all heads, counted without caches", title_justify="left")
    table.add_column("")
    for mode in ("forward", "backward"):
        table.add_column(mode, justify="right")
    tiles = result["traffic"]["tiles"]
    for name in result["traffic"]["forward"]:
        if name == "this kernel" and not result["kernels"]:
            continue
        label = f"{name}, {tiles[name][0]} x {tiles[name][1]}" if name in tiles else name
        label = {"this kernel": "flashtile", "at least": "each tensor once"}.get(name, label)
        style = "bold green" if name == "this kernel" else ""
        table.add_row(label, *(size(result["traffic"][mode][name]) for mode in ("forward", "backward")), style=style)
    table.add_section()
    table.add_row("floating-point operations", *(number(result["flops"][mode]) for mode in ("forward", "backward")))
    times = (("products at the machine's limit", "compute_ms"), ("each tensor once at its limit", "memory_ms"))
    for label, key in times:
        table.add_row(label, *(milliseconds(result["bound"][mode][key]) for mode in ("forward", "backward")))
    return table


def _sentences(result: Result) -> str:
    limits = result["limits"]
    lines = [
        f"{result['visible_share']:.1%} of the query-key pairs are visible.",
        f"Limits: {limits['matmul_tflops']:.4g} TFLOP/s and {limits['copy_gbps']:.4g} GB/s ({limits['source']}).",
    ]
    for mode, bound in result["bound"].items():
        text = f"{mode}: bound by {bound['bound']}, {bound['flops_per_byte']:.0f} operations a byte"
        if bound["bound"] == "compute" and bound["cache_share"] > 0:
            text += f", if caches serve {bound['cache_share']:.0%} of what is read again"
        lines.append(text + ".")
    return "\n".join(lines)
