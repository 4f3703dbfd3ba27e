"""`flashtile doctor`: what this machine has, which backend serves what, what does not fit together, small runs."""

from __future__ import annotations

import platform
import re
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from importlib import metadata

import torch

from flashtile import dispatch
from flashtile.cli import machine
from flashtile.cli.console import Result, progress
from flashtile.cli.doctor_view import show
from flashtile.cli.options import option
from flashtile.cli.peers_flash import FLASH_2, FLASH_3, FLASH_4
from flashtile.masks import Causal
from flashtile.problem import DTYPES
from flashtile.testing import Case, WrongResultError, run_case

__all__ = ["Options", "run", "show"]

OLDEST_TORCH = (2, 10)
OLDEST_TRITON = (3, 6)

TINY = Case("doctor", "does it run at all, and right", batch=1, q_len=33, k_len=40, heads=4, kv_heads=2, mask=Causal())
RUN_DTYPES = (torch.bfloat16, torch.float32)

# What a user may ask for, as changes of a plain call.
REQUESTS: dict[str, dict[str, object]] = {
    "plain": {},
    "causal": {"window_right": 0},
    "window": {"window_left": 100, "window_right": 0},
    "mask by table": {"table": True},
    "softcap": {"softcap": 30.0},
    "ALiBi": {"alibi": True},
    "additive bias": {"bias": "additive", "bias_shape": (1, 8, 256, 256)},
    "boolean mask": {"bias": "boolean", "bias_shape": (1, 1, 256, 256)},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.1},
    "packed sequences": {"varlen": True, "total_q": 512, "total_k": 512},
    "head dim 1": {"qk_dim": 1, "v_dim": 1},
    "head dim 256": {"qk_dim": 256, "v_dim": 256},
    "other v head dim": {"qk_dim": 192, "v_dim": 128},
    "deterministic": {"deterministic": True},
}


@dataclass(frozen=True)
class Options:
    device: str | None = option(None, "cuda, cpu, ...; default: all that PyTorch can use here.")


def run(options: Options) -> Result:
    """Looks at everything; `ok` is false where a run fails or versions cannot work together."""
    devices = [options.device] if options.device else list(dict.fromkeys([machine.default_device(), "cpu"]))
    for device in devices:
        machine.check_device(device)
    found = machine.versions()
    has_gpu = shutil.which("nvidia-smi") is not None
    notes = mismatches(found, required_triton(), torch.cuda.is_available(), has_gpu, platform.system())
    attempts = [(name, device, dtype) for device in devices for name in dispatch.BACKENDS for dtype in RUN_DTYPES]
    runs = []
    with progress("doctor", len(attempts)) as step:
        for attempt in attempts:
            step(" ".join(map(str, attempt)))
            runs += _try(*attempt)
            step("", 1)
    return {
        "ok": all(note["level"] != "error" for note in notes) and all(entry["ok"] for entry in runs),
        "devices": [machine.device_facts(device) for device in devices],
        "versions": found,
        "commit": machine.commit(),
        "peers": {peer.name: peer.missing() for peer in (FLASH_2, FLASH_3, FLASH_4)},
        "mismatches": notes,
        "serves": {device: {name: _refusals(name, device) for name in dispatch.BACKENDS} for device in devices},
        "runs": runs,
    }


def required_triton() -> str | None:
    """The version of Triton that the installed PyTorch asks for; None where it asks for none."""
    for requirement in metadata.requires("torch") or ():
        named = re.match(r"(?:pytorch-)?triton(?:-\w+)?\s*==\s*([\w.+]+)", requirement)
        if named:
            return named[1]
    return None


def mismatches(
    versions: dict[str, str | None], triton_wanted: str | None, cuda_usable: bool, has_gpu: bool, system: str
) -> list[Result]:
    """Versions that do not fit together, each with a level: "error" cannot work, "warning" loses something."""
    notes: list[Result] = []

    def note(level: str, text: str) -> None:
        notes.append({"level": level, "text": text})

    torch_version, triton_version = versions["torch"], versions["triton"]
    if _number(torch_version) < OLDEST_TORCH:
        note("error", f"torch {torch_version} is older than {_text(OLDEST_TORCH)}, the oldest that flashtile uses")
    if triton_version is None and (cuda_usable or system == "Linux"):
        note("warning", "triton is not installed, so there are no GPU kernels: pip install triton")
    elif triton_version is not None and _number(triton_version) < OLDEST_TRITON:
        note("error", f"triton {triton_version} is older than {_text(OLDEST_TRITON)}, the oldest for the kernels")
    if triton_version and triton_wanted and _number(triton_version, 3) != _number(triton_wanted, 3):
        note("warning", f"torch {torch_version} asks for triton {triton_wanted}, {triton_version} is installed")
    build = f"CUDA {versions['cuda']}" if versions["cuda"] else f"ROCm {versions['hip']}" if versions["hip"] else None
    if build and not cuda_usable:
        note("warning", f"torch is built for {build} but finds no usable GPU: driver missing, too old, or no device")
    if has_gpu and not build:
        note("warning", f"there is an NVIDIA driver, but torch {torch_version} is built for CPUs only")
    return notes


def _number(version: str | None, places: int = 2) -> tuple[int, ...]:
    """(major, minor, ...) of a version such as 2.13.0+cpu."""
    numbers = re.findall(r"\d+", (version or "0").partition("+")[0])
    return tuple(int(number) for number in (*numbers, 0, 0, 0)[:places])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _refusals(backend: str, device: str) -> dict[str, list[str]]:
    """The backend's sentences, each with the requests that it answers so; empty where it serves everything."""
    sentences: dict[str, list[str]] = defaultdict(list)
    supports = dispatch.load(backend).supports
    for request, changes in REQUESTS.items():
        for dtype in DTYPES:
            reason = supports(replace(machine.plain_problem(device, dtype), **changes))  # type: ignore[arg-type]
            if reason is not None:
                sentences[reason].append(f"{request}, {str(dtype).removeprefix('torch.')}")
    return sentences


def _try(backend: str, device: str, dtype: torch.dtype) -> list[Result]:
    """One small call, forward and backward, against float64; nothing where the backend says that it cannot."""
    if dispatch.load(backend).supports(machine.plain_problem(device, dtype)) is not None:
        return []
    started = time.perf_counter()
    name = str(dtype).removeprefix("torch.")
    entry: Result = {"backend": backend, "device": device, "dtype": name, "ok": True, "error": None}
    try:
        entry["share"] = run_case(TINY, backend, dtype, device).share
    except WrongResultError as error:
        entry.update(ok=False, error=f"wrong result: {error}")
    except Exception as error:
        # Whatever breaks on this machine is what this command is asked to find.
        entry.update(ok=False, error=f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    entry["seconds"] = time.perf_counter() - started
    return [entry]
