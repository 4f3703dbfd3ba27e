"""Time and peak memory of the three attentions over growing sequence length, forward and forward + backward."""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from flashtile.cli import machine, timing
from flashtile.cli.console import Result, Step, size
from flashtile.cli.demo.attentions import ATTENTIONS
from flashtile.cli.demo.memory import METHODS, Action, peak
from flashtile.cli.demo.settings import Scaling

MODES = {"forward": "forward", "train": "forward + backward"}
WARM_UP_LENGTH = 64
TIMING_METHODS = {
    "cpu": "median wall-clock time; the attentions take turns in one process, so a busy machine meets all alike",
    "cuda": "median time between CUDA events, with the L2 cache overwritten before each call",
}
LEAST_ROUNDS, MOST_ROUNDS = 2, 25


def run(settings: Scaling, device: str, dtype: torch.dtype, step: Step) -> Result:
    """Rows, one for each attention, mode and length: milliseconds and peak bytes, or the reason why it was left out."""
    ladder = Ladder(settings, device, dtype)
    rows = [row for length in settings.lengths for mode in MODES for row in ladder.climb(mode, length, step)]
    return {
        "settings": asdict(settings),
        "dtype": str(dtype).removeprefix("torch."),
        "memory_limit_bytes": ladder.memory_limit,
        "memory_method": METHODS.get(device),
        "timing_method": TIMING_METHODS.get(device, TIMING_METHODS["cpu"]),
        "rows": rows,
    }


def steps(settings: Scaling) -> int:
    """How many units of progress `run` reports."""
    return len(settings.lengths) * len(MODES) * (len(ATTENTIONS) + 1)


def fastest_dtype(device: str) -> torch.dtype:
    """bfloat16 where a matrix product in it is clearly faster than in float32, as on any recent GPU, else float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    matrices = [torch.randn(1024, 1024).to(dtype).to(device) for dtype in (torch.float32, torch.bfloat16)]
    products = [timing.Plain(partial(torch.matmul, m, m)) for m in matrices]
    slow, fast = timing.device_times(products, device, 0.1)
    return torch.bfloat16 if 1.5 * timing.quantiles(fast)[0] < timing.quantiles(slow)[0] else torch.float32


class Ladder:
    """Measures length after length, and leaves out an attention once its next call is predicted to be unreasonable."""

    def __init__(self, settings: Scaling, device: str, dtype: torch.dtype) -> None:
        self.settings, self.device, self.dtype = settings, device, dtype
        free = machine.free_memory(device)
        self.memory_limit = None if free is None else int(settings.memory_share * free)
        self.measured: dict[tuple[str, str], list[Result]] = {}

    def climb(self, mode: str, length: int, step: Step) -> list[Result]:
        """The rows of one length and mode."""
        rows = [self._memory_row(name, mode, length, step) for name in ATTENTIONS]
        step(f"{MODES[mode]}, {length} tokens: time")
        alive = [row for row in rows if row["reason"] is None]
        actions = [prepare(row["attention"], mode, length, self.settings, self.device, self.dtype)() for row in alive]
        for row, times in zip(alive, self._times(actions), strict=True):
            median, low, high = timing.quantiles(times)
            row["milliseconds"] = {"median": median, "low": low, "high": high, "rounds": len(times)}
            self.measured.setdefault((row["attention"], mode), []).append(row)
        step("", advance=1)
        return rows

    def _memory_row(self, name: str, mode: str, length: int, step: Step) -> Result:
        step(f"{MODES[mode]}, {length} tokens: memory of {name}")
        found, reason = None, self._unreasonable(name, mode, length)
        if reason is None:
            found, reason = peak(prepare(name, mode, length, self.settings, self.device, self.dtype), self.device)
            # A device that does not tell its memory can still be timed.
            reason = None if self.device not in METHODS else reason
        step("", advance=1)
        row = {"attention": name, "mode": mode, "length": length, "milliseconds": None, "peak_bytes": found}
        return row | {"reason": reason}

    def _unreasonable(self, name: str, mode: str, length: int) -> str | None:
        """Why this call is left out: its predecessor was, or it grows too large if it grows as it did until now."""
        before = self.measured.get((name, mode), [])
        index = self.settings.lengths.index(length)
        if index == 0:
            return None
        if not before or before[-1]["length"] != self.settings.lengths[index - 1]:
            return f"left out from a shorter length on, as {self.settings.lengths[index - 1]} tokens were"
        growth = (length / before[-1]["length"]) ** 2
        seconds = before[-1]["milliseconds"]["median"] / 1000 * growth
        if seconds > self.settings.call_seconds:
            return f"would take about {seconds:.0f} s a call, more than {self.settings.call_seconds:g} s"
        held = before[-1]["peak_bytes"]
        needed = None if held is None else _next_peak(before, length)
        if needed is not None and self.memory_limit is not None and needed > self.memory_limit:
            return f"would need about {size(needed)}, more than {size(self.memory_limit)}"
        return None

    def _times(self, actions: list[Action]) -> list[list[float]]:
        """Milliseconds of each round of each action."""
        if self.device == "cuda":
            return timing.device_times([timing.Plain(a) for a in actions], self.device, self.settings.seconds)
        rounds: list[list[float]] = [[] for _ in actions]
        until = time.perf_counter() + self.settings.seconds
        while actions and len(rounds[0]) < MOST_ROUNDS:
            if len(rounds[0]) >= LEAST_ROUNDS and time.perf_counter() > until:
                break
            for times, action in zip(rounds, actions, strict=True):
                before = time.perf_counter()
                action()
                timing.synchronize(self.device)
                times.append((time.perf_counter() - before) * 1e3)
        return rounds


def _next_peak(before: list[Result], length: int) -> float:
    """The peak memory at the next length, growing as between the last two lengths; at least in proportion."""
    last = before[-1]
    growth = length / last["length"]
    if len(before) > 1 and before[-2]["peak_bytes"]:
        growth = max(growth, last["peak_bytes"] / before[-2]["peak_bytes"])
    return float(last["peak_bytes"] * growth)


def prepare(name: str, mode: str, length: int, settings: Scaling, device: str, dtype: torch.dtype) -> partial[Action]:
    """A picklable maker of the action; the maker also runs a short call of the same kind, so that code is loaded."""
    return partial(_prepare, name, mode, length, settings, device, dtype)


def _prepare(name: str, mode: str, length: int, settings: Scaling, device: str, dtype: torch.dtype) -> Action:
    action, short = (
        _action(name, mode, (settings.batch, rows, settings.heads, settings.dim), device, dtype)
        for rows in (length, min(length, WARM_UP_LENGTH))
    )
    short()
    return action


def _action(name: str, mode: str, shape: tuple[int, ...], device: str, dtype: torch.dtype) -> Action:
    attend = ATTENTIONS[name]
    generator = torch.Generator(device).manual_seed(0)
    tensors: list[Any] = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(4)]
    *inputs, dout = tensors
    if mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return attend(*inputs)

        return forward
    leaves = [t.requires_grad_() for t in inputs]
    return lambda: torch.autograd.grad(attend(*leaves), leaves, dout)
