"""Trains a byte-level GPT on real text, with flashtile, PyTorch's SDPA or standard attention; prints tokens per second.

    python examples/train_gpt.py                                          # half a minute on a CPU
    python examples/train_gpt.py --attention standard                     # the same losses, up to rounding
    torchrun --nproc-per-node 2 examples/train_gpt.py --context 2048      # data parallel, on CPUs or GPUs

The text is Python's own standard library as it lies on the machine, or --text FILE. The losses depend on the seed and
on the global batch, --batch times the number of ranks, not on how it is spread over ranks. Needs the packages of
flashtile[cli].
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from flashtile.cli import machine, timing
from flashtile.cli.demo import text
from flashtile.cli.demo.attentions import ATTENTIONS
from flashtile.cli.demo.gpt import GPT
from flashtile.cli.demo.settings import Training
from flashtile.cli.demo.training import learning_rate, windows_of

SIZES = {
    "cpu": {"layers": 2, "heads": 3, "width": 192, "context": 1024, "batch": 1, "steps": 300},
    "gpu": {"layers": 12, "heads": 6, "width": 768, "context": 4096, "batch": 4, "steps": 200},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP_STEPS = 3  # compilation and first allocations: not counted in tokens per second
HELD_OUT_WINDOWS = 16
SEED = 0


def options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", choices=ATTENTIONS, default="flashtile")
    parser.add_argument("--device", default=machine.default_device())
    parser.add_argument("--dtype", choices=DTYPES, help="bfloat16 by autocast; default: bfloat16 on GPUs, else float32")
    parser.add_argument("--text", help="a file to learn; default: Python's standard library")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    for name, of_cpu in SIZES["cpu"].items():
        what = f"default {of_cpu} on a CPU, {SIZES['gpu'][name]} on a GPU" + (
            "; each rank's" if name == "batch" else ""
        )
        parser.add_argument(f"--{name}", type=int, help=what)
    chosen = parser.parse_args(arguments)
    on_cpu = chosen.device == "cpu"
    for name, size in SIZES["cpu" if on_cpu else "gpu"].items():
        setattr(chosen, name, size if getattr(chosen, name) is None else getattr(chosen, name))
    chosen.dtype = chosen.dtype or ("float32" if on_cpu else "bfloat16")
    return chosen


def settings_of(chosen: argparse.Namespace) -> Training:
    return Training(
        layers=chosen.layers, heads=chosen.heads, width=chosen.width, context=chosen.context, batch=chosen.batch,
        steps=chosen.steps, windows=HELD_OUT_WINDOWS, sampled=0, learning_rate=chosen.learning_rate,
        warm_up=max(1, chosen.steps // 8), seed=SEED,
    )  # fmt: skip


class Ranks:
    """This process's place among those that torchrun started; alone without it."""

    def __init__(self, device: str) -> None:
        self.distributed = "RANK" in os.environ
        if self.distributed:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        self.rank, self.count = (dist.get_rank(), dist.get_world_size()) if self.distributed else (0, 1)
        self.device = f"cuda:{os.environ['LOCAL_RANK']}" if self.distributed and device == "cuda" else device
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)

    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model) if self.distributed else model

    def share(self, batch: Tensor) -> Tensor:
        """This rank's part of a global batch."""
        return batch.chunk(self.count)[self.rank].to(self.device)

    def mean(self, value: Tensor) -> float:
        """The mean over ranks."""
        if self.distributed:
            dist.all_reduce(value := value.clone())
        return value.item() / self.count

    def say(self, line: str) -> None:
        if self.rank == 0:
            print(line, flush=True)

    def leave(self) -> None:
        """To be called when no DistributedDataParallel is left.

        The last owner of a process group waits for its threads; a reducer does so with the interpreter's lock in hand,
        and one of these threads may still want that lock.
        """
        if self.distributed:
            dist.barrier()  # a rank that leaves early takes its connections away from one that still reduces
            dist.destroy_process_group()


class Run:
    """A model, its optimizer and one step of training."""

    def __init__(self, chosen: argparse.Namespace, ranks: Ranks) -> None:
        self.settings, self.ranks = settings_of(chosen), ranks
        self.model = GPT(self.settings, ATTENTIONS[chosen.attention]).to(ranks.device)
        self.wrapped = ranks.wrap(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.95))
        self.device, self.dtype = ranks.device.partition(":")[0], DTYPES[chosen.dtype]
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def computing(self) -> AbstractContextManager[object]:
        return nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device, self.dtype)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean cross entropy in nats a byte over (batch, context + 1) bytes."""
        with self.computing():
            logits = self.wrapped(windows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    def step(self, windows: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, len(self.losses))
        timing.synchronize(self.device)
        before = time.perf_counter()
        loss = self.loss(windows)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        timing.synchronize(self.device)
        self.seconds.append(time.perf_counter() - before)
        self.losses.append(self.ranks.mean(loss.detach()))

    @torch.no_grad()
    def held_out(self, windows: Tensor) -> float:
        return statistics.fmean(self.loss(window[None].to(self.ranks.device)).item() for window in windows)

    def tokens_per_second(self) -> float:
        """Of all ranks together, by the median step."""
        seconds = statistics.median(self.seconds[WARM_UP_STEPS:] or self.seconds)
        return self.ranks.count * self.settings.batch * self.settings.context / seconds


def train(chosen: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Trains, prints, and returns what the JSON line holds."""
    content = text.read(chosen.text, chosen.context + 1)
    run = Run(chosen, ranks)
    parameters = sum(p.numel() for p in run.model.parameters())
    ranks.say(
        f"{chosen.attention} attention, {parameters / 1e6:.2f} M parameters, context {chosen.context}, {chosen.dtype}; "
        f"{ranks.count} x {run.device}; {content.training.numel() / 2**20:.1f} MiB of {content.source}"
    )
    generator = torch.Generator().manual_seed(SEED)
    held_out = windows_of(content.held_out, HELD_OUT_WINDOWS, chosen.context + 1, generator)
    for index in range(chosen.steps):
        # Every rank draws the whole batch, from the same seed, and takes its part.
        run.step(ranks.share(windows_of(content.training, ranks.count * chosen.batch, chosen.context + 1, generator)))
        if (index + 1) % 10 == 0 or index + 1 == chosen.steps:
            ranks.say(f"step {index + 1:4}  loss {run.losses[-1]:.3f}  {run.tokens_per_second():,.0f} tokens/s")
    result = {
        "attention": chosen.attention,
        "tokens_per_second": run.tokens_per_second(),
        "held_out_loss": run.held_out(held_out),
        "losses": run.losses,
        "parameters": parameters,
        "ranks": ranks.count,
        "device": run.device,
        "dtype": chosen.dtype,
        "peak_bytes": torch.cuda.max_memory_allocated() if run.device == "cuda" else None,
        **{name: getattr(chosen, name) for name in SIZES["cpu"]},
    }
    ranks.say(
        f"{chosen.attention}: {result['tokens_per_second']:,.0f} tokens per second, held-out loss "
        f"{result['held_out_loss']:.3f} nats a byte (bytes alone: {text.byte_entropy(content.held_out):.3f})"
    )
    return result


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    chosen = options(arguments)
    ranks = Ranks(chosen.device)
    result = train(chosen, ranks)
    if chosen.json:
        ranks.say(json.dumps(result))
    ranks.leave()
    return result


if __name__ == "__main__":
    main()
