"""Loads the scripts in examples/ as modules, so that a test can call their main()."""

from __future__ import annotations

import importlib.util
from types import ModuleType

from law import ROOT

FOLDER = ROOT / "examples"


def load(name: str) -> ModuleType:
    """The module of examples/<name>.py, not run as a program."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
