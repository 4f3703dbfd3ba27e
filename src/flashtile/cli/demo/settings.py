"""How much the demo does: about three minutes on two CPU cores, larger sizes on a GPU, and a quick form."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Exactness:
    """cases: ids of `flashtile.testing.CASES`. lengths: causal calls of these lengths come on top."""

    cases: tuple[str, ...]
    lengths: tuple[int, ...]
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


@dataclass(frozen=True)
class Scaling:
    """One causal call of (batch, length, heads, dim) for each length.

    seconds: measuring time for each length and mode. call_seconds: calls predicted to take longer are left out.
    memory_share: calls predicted to take more than this part of the free memory are left out.
    """

    batch: int
    heads: int
    dim: int
    lengths: tuple[int, ...]
    seconds: float
    call_seconds: float
    memory_share: float = 0.25


@dataclass(frozen=True)
class Training:
    """A byte-level GPT and its training. windows: held-out stretches of `context` bytes. sampled: bytes written."""

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    steps: int
    windows: int
    sampled: int
    learning_rate: float = 1e-3
    warm_up: int = 40
    seed: int = 0


@dataclass(frozen=True)
class Settings:
    """What one run of the demo does."""

    exactness: Exactness
    scaling: Scaling
    training: Training


_CASES = (
    "odd-257",
    "gqa-causal-odd",
    "dim-128",
    "v-odd",
    "window-both",
    "documents-causal",
    "softcap",
    "alibi",
    "bias-heads",
    "sinks-window-gqa",
    "dropout-causal-gqa",
    "varlen-causal",
    "logits-large",
    "everything",
)

CPU = Settings(
    Exactness(_CASES, lengths=(1024,)),
    Scaling(batch=1, heads=8, dim=64, lengths=(512, 1024, 2048, 4096, 8192, 16384), seconds=2.0, call_seconds=4.0),
    Training(layers=2, heads=3, width=192, context=1024, batch=1, steps=300, windows=16, sampled=200),
)

GPU = Settings(
    # Fewer cases than on a CPU: each is another kernel to compile, which takes longer than to run it.
    Exactness(("gqa-causal-odd", "bias-heads", "sinks-window-gqa", "dropout-causal-gqa"), lengths=(4096,)),
    Scaling(
        batch=1,
        heads=16,
        dim=128,
        lengths=(1024, 2048, 4096, 8192, 16384, 32768, 65536),
        seconds=0.5,
        call_seconds=2.0,
    ),
    Training(layers=6, heads=6, width=384, context=2048, batch=2, steps=300, windows=16, sampled=300),
)

QUICK = Settings(
    Exactness(("gqa-causal-odd", "bias-heads"), lengths=()),
    Scaling(batch=1, heads=2, dim=32, lengths=(128, 256, 512), seconds=0.1, call_seconds=60.0),
    Training(layers=2, heads=2, width=64, context=128, batch=4, steps=30, windows=4, sampled=40, learning_rate=2e-3),
)


def choose(device: str, quick: bool) -> Settings:
    """The settings for a device type."""
    if quick:
        return QUICK
    return GPU if device == "cuda" else CPU
