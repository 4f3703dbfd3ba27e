"""The plots of the demo's report, drawn from its result alone; each in a light and a dark form."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

from flashtile.cli.console import Result, size
from flashtile.cli.demo.attentions import TITLES
from flashtile.cli.demo.scaling import MODES


@dataclass(frozen=True)
class Theme:
    """Colours of one form; `lines` are Okabe and Ito's (2008), which the colour-blind tell apart, lighter on dark."""

    name: str
    text: str
    faint: str
    background: str
    lines: dict[str, str]


LIGHT = Theme(
    "light", "#1c2430", "#d5dae1", "#ffffff", {"standard": "#d55e00", "sdpa": "#0072b2", "flashtile": "#009e73"}
)
DARK = Theme(
    "dark", "#e4e8ee", "#3a4452", "#161b22", {"standard": "#ff8f57", "sdpa": "#62b6f2", "flashtile": "#3fd6a6"}
)
THEMES = (LIGHT, DARK)

# Drawn in this order; where curves coincide, wide and pale below, thin and dashed on top, all stay visible.
STROKES: dict[str, dict[str, Any]] = {
    "standard": {"linewidth": 3.5, "alpha": 0.45},
    "sdpa": {"linewidth": 1.3},
    "flashtile": {"linewidth": 1.0, "linestyle": (0, (4, 3))},
}


def draw(result: Result) -> dict[str, dict[str, bytes]]:
    """PNG files by plot and theme: scaling-time, scaling-memory and training-loss."""
    plots = {"scaling-time": _time, "scaling-memory": _memory, "training-loss": _loss}
    return {name: {theme.name: _png(plot, result, theme) for theme in THEMES} for name, plot in plots.items()}


def _png(plot: Any, result: Result, theme: Theme) -> bytes:
    # The object interface leaves pyplot's global state and the user's backend alone.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 10.5,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.faint,
        "axes.titlesize": 11.5,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "grid.color": theme.faint,
        "axes.facecolor": theme.background,
        "figure.facecolor": theme.background,
        "legend.facecolor": theme.background,
        "legend.edgecolor": "none",
        "legend.framealpha": 0.85,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(9.6, 3.9), layout="constrained")
        plot(figure.subplots(1, 2), result, theme)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=160, metadata={"Software": None})
    return content.getvalue()


def _time(axes: Any, result: Result, theme: Theme) -> None:
    _against_length(axes, result, theme, lambda row: row["milliseconds"] and row["milliseconds"]["median"])
    for axis in axes:
        axis.set_ylabel("time of one call")
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g} ms" if value < 1000 else f"{value / 1000:g} s")


def _memory(axes: Any, result: Result, theme: Theme) -> None:
    _against_length(axes, result, theme, lambda row: row["peak_bytes"])
    for axis in axes:
        axis.set_ylabel("peak memory beyond the inputs")
        axis.set_yscale("log", base=4)
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(lambda value, _: size(value))


def _against_length(axes: Any, result: Result, theme: Theme, value: Any) -> None:
    """One line for each attention over the sequence length; a cross where the next length was left out."""
    for axis, (mode, title) in zip(axes, MODES.items(), strict=True):
        axis.set_title(title, loc="left")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        for name, label in TITLES.items():
            rows = [r for r in result["scaling"]["rows"] if (r["attention"], r["mode"]) == (name, mode)]
            points = [(r["length"], value(r)) for r in rows if value(r)]
            if not points:
                continue
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, color=theme.lines[name], label=label)
            if any(r["reason"] for r in rows):
                axis.plot(*points[-1], marker="x", markersize=11, markeredgewidth=2, color=theme.lines[name])
        lengths = result["scaling"]["settings"]["lengths"]
        axis.set_xticks(lengths, [str(n) if n < 1024 else f"{n // 1024}k" for n in lengths])
        axis.minorticks_off()
        axis.set_xlabel("sequence length (tokens)")
        axis.grid(True)
        if axis.lines:
            axis.legend()


def _loss(axes: Any, result: Result, theme: Theme) -> None:
    training = result["training"]
    curves, gaps = axes
    losses = {name: [float(loss) for loss in run["losses"]] for name, run in training["runs"].items()}
    for name, label in TITLES.items():
        curves.plot(losses[name], color=theme.lines[name], label=label, **STROKES[name])
    curves.set_title("training loss", loc="left")
    curves.set_ylabel("nats a byte")
    for name, difference in training["differences"].items():
        gap = [abs(a - b) for a, b in zip(losses[name], losses["standard"], strict=True)]
        gaps.plot(gap, color=theme.lines[name], label=TITLES[name], **STROKES[name])
        tolerance = difference["loss_tolerance"]
    gaps.axhline(tolerance, color=theme.text, linewidth=1, linestyle=":", label=f"tolerance {tolerance:.2g}")
    # Equal losses, difference 0, stand at the foot of the axis, which is linear below a rounding of float32.
    gaps.set_yscale("symlog", linthresh=1e-7)
    gaps.set_ylim(bottom=0)
    gaps.set_title("its distance from standard attention's", loc="left")
    gaps.set_ylabel("nats a byte")
    for axis in axes:
        axis.set_xlabel("training step")
        axis.grid(True)
    curves.legend(loc="upper right")
    gaps.legend(loc="lower right")
