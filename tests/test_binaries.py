"""The kernels compile without a GPU for every target and supported Triton, and what is shipped spills no register."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
TARGETS = tuple(SHARED_MEMORY)
DIMS = (64, 128, 256)
OTHER_TRITONS = ("3.6.0", "3.9.0")

# float32 products in 3xTF32 hold a whole head dim twice, so that above 64 even the smallest tile spills a little when
# a call has every feature at once (the gradient of a shared bias above 128: a lot). Bytes; nothing else may spill.
FLOAT32_SPILLS = {
    128: {"bias": 40},
    256: {"forward": 256, "queries": 512, "keys": 768, "bias": 8192},
}


def installed(version: str) -> Path:
    """The folder of another Triton release, installed beside the environment's own on first use."""
    folder = ROOT / ".cache" / "triton" / version
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{version}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "triton").exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            subprocess.run([*pip, f"triton=={version}"], check=True)
    return folder


def needs(target: str, dim: int, version: str | None = None) -> list[dict[str, Any]]:
    """What each kernel's binary needs, compiled by another release of Triton where a version is given."""
    paths = [str(ROOT / "src"), str(ROOT / "tests")]
    if version is not None:
        paths.insert(0, str(installed(version)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    script = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "binaries.py"), target, str(dim)]
    done = subprocess.run(
        [*script, "all" if version is None else "few"], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(rows: list[dict[str, Any]], target: str, dim: int) -> None:
    """Raises where a kernel spills registers or takes more shared memory than the target has."""
    assert {row["kernel"] for row in rows} >= {"forward", "queries", "keys"}
    for row in rows:
        assert row["registers"] > 0, row
        known = FLOAT32_SPILLS.get(dim, {}) if "float32" in row["problem"] else {}
        assert row["spills"] <= known.get(row["kernel"], 0), f"spills: {row}"
        assert row["shared"] <= SHARED_MEMORY[target], f"shared memory: {row}"


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("target", TARGETS)
def test_shipped_tiles_spill_nothing(target: str, dim: int) -> None:
    check(needs(target, dim), target, dim)


@pytest.mark.parametrize("version", OTHER_TRITONS)
@pytest.mark.parametrize("target", TARGETS)
def test_oldest_and_newest_triton_compile_the_same(version: str, target: str) -> None:
    check(needs(target, 128, version), target, 128)


def test_a_spill_is_caught() -> None:
    row = {"kernel": "forward", "problem": "bfloat16", "registers": 255, "spills": 8, "shared": 1024}
    rows = [row, {**row, "kernel": "queries", "spills": 0}, {**row, "kernel": "keys", "spills": 0}]
    with pytest.raises(AssertionError, match="spills"):
        check(rows, "sm_90", 256)


def test_too_much_shared_memory_is_caught() -> None:
    row = {"kernel": "forward", "problem": "bfloat16", "registers": 255, "spills": 0, "shared": 2**17}
    with pytest.raises(AssertionError, match="shared memory"):
        check([row, {**row, "kernel": "queries"}, {**row, "kernel": "keys"}], "gfx942", 128)
