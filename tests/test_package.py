"""What `pip install flashtile` brings: everything the package reads, its types, its command, one version."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from law import PACKAGE, ROOT

import flashtile


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of a copy of this checkout, so that building leaves nothing behind in it."""
    folder = tmp_path_factory.mktemp("wheel")
    without_caches = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", folder / "src", ignore=without_caches)
    for path in [ROOT / "pyproject.toml", ROOT / "LICENSE", *ROOT.glob("README.md")]:
        shutil.copy(path, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "out").glob("*.whl")
    return zipfile.ZipFile(path)


def read(wheel: zipfile.ZipFile, suffix: str) -> str:
    (name,) = (name for name in wheel.namelist() if name.startswith("flashtile-") and name.endswith(suffix))
    return wheel.read(name).decode()


def test_every_file_of_the_package_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    here = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"flashtile/py.typed", "flashtile/cli/model_shapes.json"} <= here
    # A folder flash_attn-*.dist-info inside the package is data: the name that install() gives flash_attn.
    assert here == {name for name in wheel.namelist() if not name.startswith("flashtile-")}


def test_metadata(wheel: zipfile.ZipFile) -> None:
    metadata = read(wheel, "METADATA").splitlines()
    assert f"Version: {flashtile.__version__}" in metadata
    assert "License-Expression: BSD-3-Clause" in metadata
    required = [line for line in metadata if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert required == [
        "Requires-Dist: torch>=2.10",
        "Requires-Dist: numpy",
        'Requires-Dist: triton>=3.6; platform_system == "Linux"',
    ]
    assert read(wheel, "entry_points.txt").split() == ["[console_scripts]", "flashtile", "=", "flashtile.cli.app:main"]


def test_tested_versions_satisfy_the_requirements() -> None:
    pinned = dict(
        line.split(";")[0].strip().split("==")
        for line in (ROOT / "requirements" / "tested.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    assert {"torch", "triton", "numpy", "typer", "rich", "matplotlib", "pytest", "ruff", "mypy"} <= set(pinned)
    assert tuple(map(int, pinned["torch"].split("."))) >= (2, 10)
    assert tuple(map(int, pinned["triton"].split("."))) >= (3, 6)
    assert Path(ROOT / "LICENSE").read_text().startswith("BSD 3-Clause License")
