"""The same small GPT trained once with each attention, from the same seed on the same bytes, in lockstep.

All attentions are exact, so the loss curves differ by rounding alone, which training amplifies. PyTorch's SDPA against
standard attention shows how much that is.
"""

from __future__ import annotations

import math
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial

import torch
from torch import Tensor

from flashtile.cli import timing
from flashtile.cli.console import Result, Step
from flashtile.cli.demo.attentions import ATTENTIONS
from flashtile.cli.demo.gpt import GPT, write
from flashtile.cli.demo.memory import Action, peak
from flashtile.cli.demo.settings import Training
from flashtile.cli.demo.text import Text, byte_entropy

# Nats a byte that a loss may differ from standard attention's, at any step: one in a hundred of a typical loss. Where
# PyTorch's SDPA itself differs by more than half of this, twice its difference is allowed: in float32 it stays
# within a tenth of this, in bfloat16 it has been seen at 0.03. A wrong attention leaves it within a few steps.
LOSS_TOLERANCE = 0.02
CONTROL = "sdpa"
CONTROL_FACTOR = 2.0
# Relative difference of the whole first gradient, before any amplification.
GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
FINAL_SHARE = 0.05  # the learning rate ends at this part of its peak
PROMPT = b"def "


class Trainee:
    """A model with one attention, its optimizer and its records."""

    def __init__(self, name: str, settings: Training, device: str, dtype: torch.dtype) -> None:
        self.name, self.settings, self.device, self.dtype = name, settings, device, dtype
        self.model = GPT(settings, ATTENTIONS[name]).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), settings.learning_rate, betas=(0.9, 0.95))
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.first_gradient: Tensor | None = None

    def train(self, text: Tensor) -> None:
        """One step on (batch, length + 1) bytes."""
        rate = learning_rate(self.settings, len(self.losses))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        timing.synchronize(self.device)
        before = time.perf_counter()
        with self._computing():
            loss = self.model.loss(text)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - before)
        if self.first_gradient is None:
            self.first_gradient = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])

    def _computing(self) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device, self.dtype)

    @torch.no_grad()
    def evaluate(self, windows: Tensor) -> float:
        """Mean loss in nats a byte over (windows, length + 1) bytes that training never saw."""
        with self._computing():
            return statistics.fmean(self.model.loss(window[None]).item() for window in windows)


def learning_rate(settings: Training, step: int) -> float:
    """Linear warm-up, then a cosine down to FINAL_SHARE of the peak."""
    warm = min(1.0, (step + 1) / settings.warm_up)
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return settings.learning_rate * warm * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


def windows_of(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` random stretches of `length` bytes, int64."""
    starts = torch.randint(text.numel() - length + 1, (count,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts.tolist()]).long()


def run(settings: Training, text: Text, device: str, dtype: torch.dtype, step: Step) -> Result:
    """Trains all, and compares losses, held-out losses, time and memory. dtype: float32, or bfloat16 by autocast."""
    trainees = [Trainee(name, settings, device, dtype) for name in ATTENTIONS]
    generator = torch.Generator().manual_seed(settings.seed)
    held_out = windows_of(text.held_out, settings.windows, settings.context + 1, generator).to(device)
    for index in range(settings.steps):
        step(f"step {index}, {trainees[-1].losses[-1]:.2f} nats a byte" if index else "first step")
        batch = windows_of(text.training, settings.batch, settings.context + 1, generator).to(device)
        for trainee in trainees:
            trainee.train(batch)
        step("", advance=1)
    step("held-out loss")
    runs = {trainee.name: _record(trainee, held_out) for trainee in trainees}
    for name, record in runs.items():
        step(f"peak memory of a step with {name}")
        found = peak(partial(_prepare_step, name, settings, device, dtype), device)
        record.update(peak_bytes=found.bytes, peak_reason=found.reason)
    written = write(trainees[-1].model, PROMPT, settings.sampled, settings.context, device)
    return {
        "settings": asdict(settings),
        "dtype": "float32" if dtype == torch.float32 else "bfloat16 autocast",
        "parameters": sum(p.numel() for p in trainees[0].model.parameters()),
        "text": {
            "source": text.source,
            "files": text.files,
            "training_bytes": text.training.numel(),
            "held_out_bytes": text.held_out.numel(),
            "held_out_byte_entropy": byte_entropy(text.held_out),
        },
        "runs": runs,
        "differences": _differences(trainees, runs),
        "sample": {"prompt": PROMPT.decode(), "text": written[len(PROMPT) :].decode(errors="replace")},
    }


def _record(trainee: Trainee, held_out: Tensor) -> Result:
    return {
        "losses": trainee.losses,
        "held_out_loss": trainee.evaluate(held_out),
        "step_milliseconds": statistics.median(trainee.seconds) * 1e3,
        "total_seconds": sum(trainee.seconds),
    }


def _differences(trainees: list[Trainee], runs: dict[str, Result]) -> dict[str, Result]:
    """How far each run is from the one with standard attention, and whether that is within the tolerances."""
    standard, *others = trainees
    found = {trainee.name: _distance(trainee, standard, runs) for trainee in others}
    control = found[CONTROL]["largest_loss_gap"]
    loss_tolerance = LOSS_TOLERANCE if math.isnan(control) else max(LOSS_TOLERANCE, CONTROL_FACTOR * control)
    gradient_tolerance = GRADIENT_TOLERANCE[standard.dtype]
    for distance in found.values():
        gaps = (distance["largest_loss_gap"], distance["held_out_gap"])
        # Written so that a nan counts as different.
        distance["curves_ok"] = all(gap <= loss_tolerance for gap in gaps)
        distance["gradient_ok"] = distance["first_gradient"] <= gradient_tolerance
        distance.update(loss_tolerance=loss_tolerance, first_gradient_tolerance=gradient_tolerance)
    return found


def _distance(trainee: Trainee, standard: Trainee, runs: dict[str, Result]) -> Result:
    own, other = trainee.first_gradient, standard.first_gradient
    assert own is not None and other is not None
    gaps = [abs(a - b) for a, b in zip(trainee.losses, standard.losses, strict=True)]
    worst = max(gaps, key=lambda gap: math.inf if math.isnan(gap) else gap)
    return {
        "first_gradient": ((own - other).norm() / other.norm()).item(),
        "largest_loss_gap": worst,
        "largest_loss_gap_step": gaps.index(worst),
        "held_out_gap": abs(runs[trainee.name]["held_out_loss"] - runs[standard.name]["held_out_loss"]),
    }


def _prepare_step(name: str, settings: Training, device: str, dtype: torch.dtype) -> Action:
    """One training step whose model and optimizer state exist already; a step on a few bytes made them."""
    trainee = Trainee(name, replace(settings, steps=2), device, dtype)
    generator = torch.Generator().manual_seed(settings.seed)
    text = torch.randint(256, (settings.batch, settings.context + 1), generator=generator).to(device)
    trainee.train(text[:, :17])
    return partial(trainee.train, text)
