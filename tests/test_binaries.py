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


def check(rows: list[dict[str, Any]], target: str) -> None:
    """Raises where a kernel spills registers or takes more shared memory than the target has."""
    assert {row["kernel"] for row in rows} >= {"forward", "queries", "keys"}
    for row in rows:
        assert row["registers"] > 0, row
        assert row["spills"] == 0, f"spills: {row}"
        assert row["shared"] <= SHARED_MEMORY[target], f"shared memory: {row}"


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("target", TARGETS)
def test_shipped_tiles_spill_nothing(target: str, dim: int) -> None:
    check(needs(target, dim), target)


@pytest.mark.parametrize("version", OTHER_TRITONS)
@pytest.mark.parametrize("target", TARGETS)
def test_oldest_and_newest_triton_compile_the_same(version: str, target: str) -> None:
    check(needs(target, 128, version), target)


def test_a_spill_is_caught() -> None:
    row = {"kernel": "forward", "registers": 255, "spills": 8, "shared": 1024}
    rows = [row, {**row, "kernel": "queries", "spills": 0}, {**row, "kernel": "keys", "spills": 0}]
    with pytest.raises(AssertionError, match="spills"):
        check(rows, "sm_90")


def test_too_much_shared_memory_is_caught() -> None:
    row = {"kernel": "forward", "registers": 255, "spills": 0, "shared": 2**17}
    with pytest.raises(AssertionError, match="shared memory"):
        check([row, {**row, "kernel": "queries"}, {**row, "kernel": "keys"}], "gfx942")
