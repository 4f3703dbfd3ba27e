"""Plots of `bench` rows: speed and memory over sequence length, and a chart of calls that differ in more than that."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashtile.cli.console import Result, UsageError
from flashtile.dispatch import BACKENDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One look for each peer in all plots, whoever else takes part; flashtile is drawn last and strongest.
LOOKS = {
    "flashtile": ("#d62728", "o"),
    "standard": ("#7f7f7f", "s"),
    "sdpa": ("#17becf", "P"),
    "sdpa-flash": ("#1f77b4", "^"),
    "sdpa-efficient": ("#aec7e8", "v"),
    "sdpa-cudnn": ("#2ca02c", "D"),
    "sdpa-math": ("#c7c7c7", "X"),
    "flex": ("#ff7f0e", "<"),
    "torch-varlen": ("#9edae5", ">"),
    "flash2": ("#9467bd", "h"),
    "flash3": ("#8c564b", "p"),
    "flash4": ("#e377c2", "*"),
}
SPARE = (("#bcbd22", "d"), ("#393b79", "8"), ("#ad494a", "H"))
DPI = 130
LIMIT_IN_SIGHT = 1.6  # the machine's limit is drawn where it is at most this many times the fastest row


def draw(rows_path: Path, folder: Path) -> list[Path]:
    """Draws every chart that the rows of a file give, as PNG; returns the paths.

    Of rows that measured the same thing the last one counts. Raises UsageError where there is nothing to draw.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot: needs matplotlib: pip install flashtile[cli]")
    rows = [row for row in read(rows_path) if row["status"] == "measured" and "ms" in row]
    if not rows:
        raise UsageError(f"--plot: {rows_path} has no measured rows")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (device, dtype), same_machine in _grouped(rows, lambda row: (row["device"]["name"], row["dtype"])):
        where = f"{device}, {dtype}"
        suffix = f"{dtype}-{_slug(device)}"
        sequences = [row for row in same_machine if row["feature"] != "model"]
        for feature, alike in _grouped(sequences, lambda row: row["feature"]):
            paths += _draw_lengths(alike, feature, where, folder, suffix)
        for mode, calls in _grouped(same_machine, lambda row: row["mode"]):
            models = [row for row in calls if row["feature"] == "model"]
            features = _beside_features([row for row in calls if row["feature"] != "model"])
            charts = (("models", "calls of known models", models), ("features", "with features", features))
            for name, title, shown in charts:
                if shown:
                    paths.append(_save(_dots(shown, f"{mode}, {title}: {where}"), folder, name, mode, suffix))
    return paths


def read(path: Path) -> list[Result]:
    """The rows of a file, the last of those that measured the same call, peer and mode on the same device."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"--plot: {error}") from None
    latest: dict[tuple[Any, ...], Result] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key = (row["device"]["name"], row["dtype"], row["mode"], row["peer"], json.dumps(row["call"]))
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"--plot: line {number} of {path} is no row of bench") from None
        latest.pop(key, None)
        latest[key] = row
    return list(latest.values())


def _draw_lengths(rows: list[Result], feature: str, where: str, folder: Path, suffix: str) -> list[Path]:
    """Speed for each mode and, once, memory, over the sequence length; nothing where there is one length only."""
    if len({row["call"]["q_len"] for row in rows}) < 2:
        return []
    paths = []
    by_mode = dict(_grouped(rows, lambda row: row["mode"]))
    for mode, alike in by_mode.items():
        unit, factor = _speed_unit(alike)
        draw_one = partial(_draw_speed, factor=factor)
        figure = _panels(alike, f"{feature} attention, {mode}: {where}", unit, draw_one)
        paths.append(_save(figure, folder, feature, mode, suffix))
    mode = next(mode for mode in ("train", "backward", "forward") if mode in by_mode)
    held = [row for row in by_mode[mode] if row.get("extra_bytes")]
    if held:
        what = "forward" if mode == "forward" else "forward and backward"
        title = f"{feature} attention, {what}, peak memory beyond inputs and results: {where}"
        paths.append(_save(_panels(held, title, "MiB", _draw_memory), folder, feature, "memory", suffix))
    return paths


def _panels(rows: list[Result], title: str, y_label: str, draw_one: Callable[[Axes, list[Result]], None]) -> Figure:
    """One panel for each head dim (columns) and mask (rows); panels of a row share their y axis."""
    from matplotlib.figure import Figure

    dims = sorted({row["call"]["qk_dim"] for row in rows})
    masks = sorted({row["call"]["causal"] for row in rows})
    figure = Figure(figsize=(4.2 * len(dims) + 0.6, 3.3 * len(masks) + 1.1), layout="constrained")
    panels = figure.subplots(len(masks), len(dims), squeeze=False, sharey="row")
    for line, causal in zip(panels, masks, strict=True):
        for axes, dim in zip(line, dims, strict=True):
            shown = [row for row in rows if row["call"]["qk_dim"] == dim and row["call"]["causal"] == causal]
            axes.set_title(f"{'causal' if causal else 'not causal'}, head dim {dim}", fontsize=10)
            if shown:
                draw_one(axes, shown)
            axes.grid(alpha=0.3, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        line[0].set_ylabel(y_label)
        if line[0].get_yscale() == "linear":
            line[0].set_ylim(bottom=0)  # now that all panels that share it are drawn
    for axes in panels[-1]:
        axes.set_xlabel("sequence length")
    _finish(figure, title, [axes for line in panels for axes in line])
    return figure


def _draw_speed(axes: Axes, rows: list[Result], factor: float) -> None:
    for peer, own in _in_order(rows):
        own = sorted(own, key=lambda row: row["call"]["q_len"])
        lengths = [row["call"]["q_len"] for row in own]
        colour, marker = _look(peer)
        strong = own[0]["own"]
        axes.plot(
            lengths,
            [row["tflops"] * factor for row in own],
            color=colour,
            marker=marker,
            markersize=6 if strong else 4.5,
            linewidth=2.2 if strong else 1.2,
            label=peer,
            zorder=3 if strong else 2,
        )
        # TFLOP/s from the 80 % and 20 % quantiles of the time.
        low, high = ([row["tflops"] * factor * row["ms"] / row[end] for row in own] for end in ("ms_q80", "ms_q20"))
        axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
    fastest = max(row["tflops"] for row in rows)
    limit = rows[-1]["limits"]["matmul_tflops"]
    if limit <= LIMIT_IN_SIGHT * fastest:
        axes.axhline(limit * factor, color="black", linestyle=":", linewidth=1, label="matrix product")
    _length_axis(axes, rows)


def _draw_memory(axes: Axes, rows: list[Result]) -> None:
    for peer, own in _in_order(rows):
        own = sorted(own, key=lambda row: row["call"]["q_len"])
        colour, marker = _look(peer)
        strong = own[0]["own"]
        axes.plot(
            [row["call"]["q_len"] for row in own],
            [row["extra_bytes"] / 2**20 for row in own],
            color=colour,
            marker=marker,
            markersize=6 if strong else 4.5,
            linewidth=2.2 if strong else 1.2,
            label=peer,
            zorder=3 if strong else 2,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    _length_axis(axes, rows)


def _length_axis(axes: Axes, rows: list[Result]) -> None:
    lengths = sorted({row["call"]["q_len"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in lengths])
    axes.minorticks_off()


def _dots(rows: list[Result], title: str) -> Figure:
    """One line for each call, one mark for each peer."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    unit, factor = _speed_unit(rows)
    figure = Figure(figsize=(9, 0.36 * len(cases) + 1.9), layout="constrained")
    axes = figure.subplots()
    for place, case in enumerate(cases):
        speeds = [row["tflops"] * factor for row in rows if row["case"] == case]
        axes.plot([min(speeds), max(speeds)], [place, place], color="#dddddd", linewidth=2, zorder=1)
    for peer, own in _in_order(rows):
        colour, marker = _look(peer)
        places = [cases.index(row["case"]) for row in own]
        axes.scatter(
            [row["tflops"] * factor for row in own],
            places,
            color=colour,
            marker=marker,
            s=75 if own[0]["own"] else 38,
            label=peer,
            zorder=3 if own[0]["own"] else 2,
        )
    axes.set_yticks(range(len(cases)), cases, fontsize=8.5)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high / low < 1000:  # else a tick for each 1, 2 and 5 would crowd
        ticks = [step * 10.0**power for power in range(-3, 7) for step in (1, 2, 5)]
        axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(unit)
    _finish(figure, title, [axes])
    return figure


def _finish(figure: Figure, title: str, panels: Iterable[Axes]) -> None:
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    figure.suptitle(title, fontsize=11)
    order = sorted(entries, key=lambda label: (not label.startswith("flashtile"), label == "matrix product"))
    columns = min(len(order), max(2, math.floor(figure.get_figwidth() / 1.5)))
    figure.legend([entries[label] for label in order], order, loc="outside lower center", ncols=columns, frameon=False)


def _in_order(rows: list[Result]) -> list[tuple[str, list[Result]]]:
    """Rows by peer, flashtile's last, so that they are drawn on top."""
    return sorted(_grouped(rows, lambda row: row["peer"]), key=lambda entry: entry[1][0]["own"])


def _look(peer: str) -> tuple[str, str]:
    if peer in LOOKS:
        return LOOKS[peer]
    if peer.startswith("flashtile:"):
        shades = dict(zip(BACKENDS, ("#d62728", "#e8743b", "#7b1f1f", "#f7a58a"), strict=True))
        return shades.get(peer.partition(":")[2], "#d62728"), "o"
    return SPARE[sum(map(ord, peer)) % len(SPARE)]


def _speed_unit(rows: list[Result]) -> tuple[str, float]:
    return ("GFLOP/s", 1e3) if max(row["tflops"] for row in rows) < 2 else ("TFLOP/s", 1.0)


def _beside_features(rows: list[Result]) -> list[Result]:
    """The rows with features, after the plain ones of the same sizes; none where all are plain."""

    def sizes(row: Result) -> tuple[Any, ...]:
        return row["call"]["qk_dim"], row["call"]["causal"], row["case"].rpartition("-n")[2]

    special = [row for row in rows if row["feature"] != "plain"]
    wanted = {sizes(row) for row in special}
    return [row for row in rows if row["feature"] == "plain" and sizes(row) in wanted] + special if special else []


def _grouped(rows: Iterable[Result], key: Callable[[Result], Any]) -> list[tuple[Any, list[Result]]]:
    """Rows by key, in the order of first sight."""
    groups: dict[Any, list[Result]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return list(groups.items())


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _save(figure: Figure, folder: Path, *words: str) -> Path:
    path = folder / f"{'-'.join(_slug(word) for word in words)}.png"
    figure.savefig(path, dpi=DPI)
    return path
