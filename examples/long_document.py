"""Reads a document of 100,000 tokens with one model: time and peak memory, with flashtile and with standard attention.

    python examples/long_document.py                    # three minutes on two CPU cores
    python examples/long_document.py --train            # forward and backward: a training step on the whole document
    python examples/long_document.py --length 20000 --text book.txt

The model is a small byte-level GPT without training, the document Python's standard library or --text FILE: what is
shown is the cost of attention over the whole of it, causal, and with a sliding window. Lengths double up to --length;
standard attention stops where its scores would take more than a quarter of the free memory, and what it would need is
said instead. At the full length, rows drawn at random are compared with float64. Needs the packages of flashtile[cli].
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flashtile
from flashtile.cli import machine, timing
from flashtile.cli.console import milliseconds, size
from flashtile.cli.demo import text
from flashtile.cli.demo.attentions import Attention, standard, tiled
from flashtile.cli.demo.gpt import GPT
from flashtile.cli.demo.memory import peak
from flashtile.cli.demo.settings import Training

SIZES = {"cpu": (1, 2, 128), "gpu": (4, 8, 1024)}  # layers, heads, width
WARM_UP = 256
MEMORY_SHARE = 0.25
CHECKED_ROWS = 16
MOST_READINGS, ENOUGH_SECONDS = 5, 3.0
Row = dict[str, Any]


def windowed(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention to the last `window` tokens."""
    out = flashtile.attention(q, k, v, causal=True, window=(window, 0))
    assert isinstance(out, Tensor)
    return out


def attentions(window: int) -> dict[str, Attention]:
    return {"standard": standard, "flashtile": tiled, f"window {window}": partial(windowed, window=window)}


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=100_000, help="tokens, which are bytes")
    parser.add_argument("--steps", type=int, default=5, help="how many lengths: the document, a half, a quarter ...")
    parser.add_argument("--window", type=int, default=1024, help="of the model with a sliding window")
    parser.add_argument("--train", action="store_true", help="forward and backward instead of forward alone")
    parser.add_argument("--device", default=machine.default_device())
    parser.add_argument("--text", help="the document; default: Python's standard library")
    chosen = parser.parse_args(arguments)
    if chosen.steps < 1 or chosen.length < 2**chosen.steps:
        parser.error(f"--length: got {chosen.length}, expected enough to be halved --steps {chosen.steps} times")
    return chosen


class Reading:
    """One model with one attention, over a document."""

    def __init__(self, chosen: argparse.Namespace, name: str, length: int) -> None:
        layers, heads, width = SIZES["cpu" if chosen.device == "cpu" else "gpu"]
        shape = Training(layers, heads, width, length, batch=1, steps=1, windows=1, sampled=0)
        self.device, self.train = chosen.device, chosen.train
        self.attend = attentions(chosen.window)[name]
        self.seen: list[Tensor] = []
        self.model = GPT(shape, self._watched).to(self.device)
        document = text.read(chosen.text, chosen.length + 1).training[: length + 1]
        self.document = document.long()[None].to(self.device)

    def _watched(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.attend(q, k, v)
        self.seen = [t.detach() for t in (q, k, v, out)]
        return out

    def __call__(self) -> float:
        """Mean loss in nats a byte over the document."""
        with torch.set_grad_enabled(self.train):
            loss = self.model.loss(self.document)
        if self.train:
            loss.backward()
        return loss.item()


def prepare(chosen: argparse.Namespace, name: str, length: int) -> Reading:
    """The reading, after a short one of the same kind, so that code is loaded."""
    Reading(chosen, name, min(length, WARM_UP))()
    return Reading(chosen, name, length)


def measure(chosen: argparse.Namespace, name: str, length: int, before: Row | None) -> Row:
    """A row: seconds, bytes and loss; or the bytes that it would need, where that is too much."""
    free = machine.free_memory(chosen.device)
    if before is not None and name == "standard":
        needed = before["needed"] or before["bytes"]
        needed = None if needed is None else needed * (length / before["length"]) ** 2
        if before["needed"] or (needed is not None and free is not None and needed > MEMORY_SHARE * free):
            return {"length": length, "seconds": None, "bytes": None, "loss": None, "needed": needed, "error": None}
    found = peak(partial(prepare, chosen, name, length), chosen.device)
    reading = prepare(chosen, name, length)
    seconds, loss = best(reading, chosen.device)
    error = largest_error(reading, chosen.window if name.startswith("window") else None)
    return {"length": length, "seconds": seconds, "bytes": found.bytes, "loss": loss, "needed": None, "error": error}


def best(reading: Callable[[], float], device: str) -> tuple[float, float]:
    """(seconds, loss) of the fastest of a few readings; of the only one where that takes long."""
    times: list[float] = []
    while len(times) < MOST_READINGS and sum(times) < ENOUGH_SECONDS:
        timing.synchronize(device)
        started = time.perf_counter()
        loss = reading()
        timing.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times), loss


def largest_error(reading: Reading, window: int | None) -> float:
    """How far rows drawn at random are from float64, relative to the largest value."""
    q, k, v, out = (t[0].double().cpu() for t in reading.seen)  # [length, heads, dim]
    rows = torch.randint(q.shape[0], (CHECKED_ROWS,), generator=torch.Generator().manual_seed(0))
    worst = 0.0
    for row in rows.tolist():
        first = 0 if window is None else max(0, row - window)
        keys, values = k[first : row + 1], v[first : row + 1]
        weights = torch.einsum("hd,khd->hk", q[row], keys).mul(q.shape[-1] ** -0.5).softmax(-1)
        exact = torch.einsum("hk,khd->hd", weights, values)
        worst = max(worst, float((exact - out[row]).abs().max()))
    return worst / float(v.abs().max())


def show(name: str, row: Row) -> str:
    if row["seconds"] is None:
        return f"{'needs ' + size(row['needed']):>22}"
    held = "?" if row["bytes"] is None else size(row["bytes"])
    return f"{milliseconds(row['seconds'] * 1e3) + ' ' + held:>22}"


def main(arguments: list[str] | None = None) -> dict[str, list[Row]]:
    """Measures, prints, and returns the rows of each attention."""
    chosen = options(arguments)
    names = attentions(chosen.window)
    rows: dict[str, list[Row]] = {name: [] for name in names}
    what = "forward and backward" if chosen.train else "forward"
    print(f"{what} of a GPT with (layers, heads, width) = {SIZES['cpu' if chosen.device == 'cpu' else 'gpu']}, float32")
    print(f"{'tokens':>8}" + "".join(f"{name:>22}" for name in names))
    for step in reversed(range(chosen.steps)):
        length = chosen.length // 2**step
        for name in names:
            before = rows[name][-1] if rows[name] else None
            rows[name].append(measure(chosen, name, length, before))
        print(f"{length:>8}" + "".join(show(name, rows[name][-1]) for name in names), flush=True)
    both = [(a, b) for a, b in zip(rows["standard"], rows["flashtile"], strict=True) if a["loss"] is not None]
    gap = max(abs(a["loss"] - b["loss"]) for a, b in both)
    print(f"losses of standard attention and flashtile differ by {gap:.1e} nats a byte at most")
    for name in list(rows)[1:]:
        print(f"{name}: {CHECKED_ROWS} rows of {chosen.length} within {rows[name][-1]['error']:.1e} of float64")
    return rows


if __name__ == "__main__":
    main()
