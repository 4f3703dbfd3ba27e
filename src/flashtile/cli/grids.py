"""The grids of `bench`: which workloads a name stands for, and what each feature changes in a plain one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.resources import files
from itertools import product
from typing import Any, NamedTuple

from flashtile.cli.console import UsageError
from flashtile.cli.workload import Workload

GRIDS = ("small", "paper", "models")


class Sizes(NamedTuple):
    """lengths x dims; the batch fills `tokens` (1: a batch of one), the heads fill `hidden` units or are `heads`."""

    lengths: tuple[int, ...]
    dims: tuple[int, ...]
    tokens: int = 1
    hidden: int = 0
    heads: int = 1


GRID_SIZES = {
    "small": Sizes((512, 1024, 2048, 4096), (64, 128), heads=8),
    # Dao 2023, section 4.1: 16k tokens, 2048 hidden units.
    "paper": Sizes((1024, 2048, 4096, 8192, 16384), (64, 128, 256), tokens=16384, hidden=2048),
    "quick": Sizes((64, 192), (32,), heads=2),
}

DROPOUT = 0.1
SOFTCAP = 50.0


def sequence_grid(
    name: str,
    lengths: list[int] | None = None,
    dims: list[int] | None = None,
    causal: bool | None = None,
    features: list[str] | None = None,
    batch: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
) -> list[Workload]:
    """The workloads of the grid `small`, `paper` or `quick`: features x head dims x masks x lengths.

    small: batch 1, 8 heads. paper: batch * length = 16384 and heads * head_dim = 2048. What is given replaces the
    grid's own; causal None is both.
    """
    own = GRID_SIZES[name]
    works = []
    for feature, dim in product(features or ["plain"], dims or own.dims):
        for is_causal, length in product((False, True) if causal is None else (causal,), lengths or own.lengths):
            rows = batch or max(1, own.tokens // length)
            q_heads = heads or max(1, own.hidden // dim if own.hidden else own.heads)
            works.append(_plain(rows, length, q_heads, kv_heads or q_heads, dim, is_causal, feature))
    return works


def _plain(batch: int, length: int, heads: int, kv_heads: int, dim: int, causal: bool, feature: str) -> Workload:
    if heads % kv_heads:
        raise UsageError(f"--kv-heads: got {kv_heads}, expected a divisor of {heads} heads")
    mask = "causal" if causal else "full"
    work = Workload(
        id=f"{feature}-{mask}-d{dim}-n{length}",
        batch=batch,
        q_len=length,
        k_len=length,
        heads=heads,
        kv_heads=kv_heads,
        qk_dim=dim,
        v_dim=dim,
        causal=causal,
        feature=feature,
    )
    for part in feature.split("+"):
        work = FEATURES[part](work)
    return work


def _windowed(work: Workload, keys: int = 512) -> Workload:
    """So many keys for each row: those up to its own, or those around it."""
    window = (keys - 1, 0) if work.causal else (keys // 2 - 1, keys // 2)
    return replace(work, window=window)


def _packed(work: Workload) -> Workload:
    """As many tokens as the plain call, in documents whose lengths go 1 : 2 : 3 : 4."""
    tokens = work.batch * work.q_len
    lengths = tuple(max(1, tokens * share // 10) for share in (2, 4, 1, 3))
    return replace(work, batch=len(lengths), q_len=max(lengths), k_len=max(lengths), lengths=lengths)


def _documents(work: Workload) -> Workload:
    """24 documents of random lengths, the same in every run."""
    lengths = tuple(random.Random(0).choices(range(64, 4097), k=24))
    return replace(work, batch=24, q_len=max(lengths), k_len=max(lengths), lengths=lengths)


FEATURES: dict[str, Callable[[Workload], Workload]] = {
    "plain": lambda work: work,
    "dropout": lambda work: replace(work, dropout_p=DROPOUT),
    "alibi": lambda work: replace(work, alibi=True),
    "softcap": lambda work: replace(work, softcap=SOFTCAP),
    "bias": lambda work: replace(work, bias=(1, work.heads, work.q_len, work.k_len), bias_grad=True),
    "window": _windowed,
    "window1024": partial(_windowed, keys=1024),
    "sinks": lambda work: replace(work, sinks=True),
    "gqa": lambda work: replace(work, kv_heads=max(1, work.heads // 4)),
    "packed": _packed,
    "documents": _documents,
    "padding": lambda work: replace(
        work, padding=tuple(max(1, work.k_len * (index % 4 + 1) // 4) for index in range(work.batch))
    ),
}


def check_features(text: str) -> list[str]:
    """The comma-separated features of --features; `+` joins several in one workload."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        for part in word.split("+"):
            if part not in FEATURES:
                raise UsageError(f"--features: got {part!r}, expected {', '.join(FEATURES)}, or several joined by +")
    if not words:
        raise UsageError(f"--features: got nothing, expected {', '.join(FEATURES)}")
    return words


def model_grid(only: str | None = None) -> list[Workload]:
    """The attention calls of known models; `only` keeps the ids that contain one of its comma-separated words."""
    entries = json.loads(files("flashtile.cli").joinpath("model_shapes.json").read_text("utf-8"))["cases"]
    words = [word.strip() for word in (only or "").split(",") if word.strip()]
    kept = [entry for entry in entries if not words or any(word in entry["id"] for word in words)]
    if not kept:
        raise UsageError(f"--only: got {only!r}, expected part of one of {', '.join(e['id'] for e in entries)}")
    return [_model(entry) for entry in kept]


def _model(entry: dict[str, Any]) -> Workload:
    lengths = tuple(entry["lengths"]) if "lengths" in entry else None
    longest = max(lengths) if lengths else None
    return Workload(
        id=entry["id"],
        batch=len(lengths) if lengths else entry["batch"],
        q_len=longest or entry["q_len"],
        k_len=longest or entry["k_len"],
        heads=entry["heads"],
        kv_heads=entry["kv_heads"],
        qk_dim=entry["head_dim"],
        v_dim=entry.get("v_head_dim", entry["head_dim"]),
        causal=entry.get("causal", False),
        window=tuple(entry["window"]) if "window" in entry else None,
        scale=entry.get("scale"),
        softcap=entry.get("softcap", 0.0),
        alibi=entry.get("alibi", False),
        bias=tuple(entry["bias"]) if "bias" in entry else None,
        bias_grad=entry.get("bias_grad", False),
        sinks=entry.get("sinks", False),
        dropout_p=entry.get("dropout_p", 0.0),
        lengths=lengths,
        padding=tuple(entry["key_lengths"]) if "key_lengths" in entry else None,
        train=entry["mode"] == "train",
        feature="model",
    )
