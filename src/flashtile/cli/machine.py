"""Facts about the machine that stand in every row of `bench` and that `doctor` prints."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import flashtile
from flashtile.cli.console import UsageError
from flashtile.problem import Problem

PACKAGES = ("torch", "triton", "numpy", "flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cutlass-dsl")


def default_device() -> str:
    """The accelerator that this PyTorch can use, else "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def check_device(device: str) -> None:
    """Raises UsageError for a device that this PyTorch cannot use."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device: got {device!r}, which this PyTorch cannot use: {error}") from None


def versions() -> dict[str, str | None]:
    """Versions of everything that a speed or a result may depend on; None for what is not installed."""
    found: dict[str, str | None] = {"flashtile": flashtile.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        found[name] = version_of(name)
    found["cuda"] = torch.version.cuda
    found["hip"] = torch.version.hip
    found["cudnn"] = str(torch.backends.cudnn.version()) if torch.cuda.is_available() else None
    return found


def version_of(distribution: str) -> str | None:
    """The installed version of a distribution, None if there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def device_facts(device: str) -> dict[str, Any]:
    """Name and size of a device."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        driver = query_gpu("driver_version")
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": list(torch.cuda.get_device_capability()),
            "processors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": None if driver is None else driver[0],
        }
    if device == "cpu":
        return {
            "type": "cpu",
            "name": processor_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "vector": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": total_memory(),
        }
    return {"type": device, "name": device}


def capability(device: str) -> tuple[int, int] | None:
    """(major, minor) of the current CUDA device, None for other devices."""
    return torch.cuda.get_device_capability() if device == "cuda" else None


def plain_problem(device: str, dtype: torch.dtype) -> Problem:
    """An everyday call on a device, to ask backends about."""
    return Problem(2, 256, 256, 8, 2, 64, 64, dtype, device, capability(device))


def processor_name() -> str:
    """The processor's marketing name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if named:
            return named[1]
    return platform.processor() or platform.machine()


def total_memory() -> int | None:
    """Bytes of main memory."""
    return _pages("SC_PHYS_PAGES")


def free_memory(device: str) -> int | None:
    """Bytes that may be allocated now; None where the system does not say."""
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + cached
    if device != "cpu":
        return None
    meminfo = Path("/proc/meminfo")
    available = re.search(r"^MemAvailable:\s*(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return int(available[1]) * 1024 if available else _pages("SC_AVPHYS_PAGES")


def _pages(name: str) -> int | None:
    if name not in getattr(os, "sysconf_names", {}):
        return None
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")


def clocks(device: str) -> dict[str, float | None]:
    """Clock rates in MHz as they are now, and a GPU's power limit in watts and temperature in Celsius."""
    if device == "cuda":
        names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu")
        values = query_gpu(*names) or [""] * len(names)
        keys = ("sm_mhz", "memory_mhz", "sm_max_mhz", "power_limit_w", "temperature_c")
        return {key: _number(value) for key, value in zip(keys, values, strict=True)}
    cpuinfo = Path("/proc/cpuinfo")
    rates = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    return {"cpu_mhz": max(map(float, rates)) if rates else None}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # nvidia-smi says "[N/A]", or nothing
        return None


def query_gpu(*fields: str) -> list[str] | None:
    """What nvidia-smi says about the current device, None where it is absent or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    which = [] if uuid is None else [f"--id=GPU-{uuid}"]
    command = [program, *which, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return None
    values = [value.strip() for value in answer.strip().split("\n")[0].split(",")]
    return values if len(values) == len(fields) else None


def commit() -> str | None:
    """The git commit of the package's own checkout, with "+" where files differ from it; None outside a checkout."""
    program = shutil.which("git")
    folder = Path(flashtile.__file__).parent
    if program is None:
        return None
    try:
        tracked = subprocess.run(
            [program, "-C", str(folder), "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, timeout=10
        )
        if tracked.returncode != 0:
            return None
        said = subprocess.run(
            [program, "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (subprocess.SubprocessError, OSError):
        return None
    return said.stdout.strip()
