"""What the commands share on the terminal: JSON on stdout, progress on stderr, sizes and durations in words."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Result = dict[str, Any]


class UsageError(ValueError):
    """An option whose value makes no sense; the command ends with exit code 2 and this message."""


class Step(Protocol):
    """Says what is being done now, and that `advance` units of work are finished."""

    def __call__(self, text: str, advance: int = 0) -> None: ...


@contextmanager
def progress(title: str, total: int) -> Iterator[Step]:
    """A progress bar on stderr where that is a terminal, nothing elsewhere."""
    screen = Console(stderr=True)
    columns = (
        TextColumn("[bold]{task.fields[title]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", style="dim"),
    )
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task("", title=title, total=total)

        def step(text: str, advance: int = 0) -> None:
            bar.update(task, description=text, advance=advance)

        yield step


def print_json(result: Result) -> None:
    """The result on stdout, as strict JSON: nan and infinities become strings."""
    sys.stdout.write(json.dumps(strict(result), indent=1, allow_nan=False) + "\n")


def strict(value: Any) -> Any:
    """The value with every non-finite float as a string, which JSON itself cannot say."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def size(count: float) -> str:
    """A number of bytes in words: 1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def number(count: float) -> str:
    """A large count in words: 137438953472 -> '137 G'."""
    for unit in ("", " k", " M", " G", " T", " P"):
        if abs(count) < 999.5:  # rounds to three digits
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:.3g} E"


def milliseconds(duration: float) -> str:
    """A duration given in milliseconds: 0.0213 -> '21.3 us'."""
    if duration < 1:
        return f"{duration * 1000:.3g} us"
    return f"{duration:.3g} ms" if duration < 1000 else f"{duration / 1000:.3g} s"


def choices(text: str, allowed: tuple[str, ...], option: str) -> list[str]:
    """The comma-separated words of an option; raises UsageError for a word that is not allowed."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in allowed:
            raise UsageError(f"{option}: got {word!r}, expected one or more of {', '.join(allowed)}")
    if not words:
        raise UsageError(f"{option}: got nothing, expected one or more of {', '.join(allowed)}")
    return words


def integers(text: str, option: str) -> list[int]:
    """The comma-separated positive integers of an option."""
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"{option}: got {text!r}, expected integers separated by commas") from None
    if any(value <= 0 for value in values):
        raise UsageError(f"{option}: got {text!r}, expected positive integers")
    return values
