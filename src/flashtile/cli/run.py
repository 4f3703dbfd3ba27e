"""`flashtile run`: another program with `import flash_attn` served by flashtile, as `python` itself would run it.

    flashtile run script.py --its --own options
    flashtile run -m pytest tests

Importable without the packages of the `cli` extra. Processes that the program starts see the same flash_attn.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

from flashtile.integrations.flash_attn import FOLDER, install

USAGE = "usage: flashtile run SCRIPT [ARGUMENTS]..., or flashtile run -m MODULE [ARGUMENTS]..."


class NothingToRunError(ValueError):
    """The arguments name no program."""


def run(arguments: list[str]) -> None:
    """Runs a script, or a module after -m, as the main program, with the rest of the arguments for its own.

    Raises NothingToRunError where there is neither, or no such file; else whatever the program raises.
    """
    as_module = arguments[:1] == ["-m"]
    name, *rest = (arguments[1:] if as_module else arguments) or [""]
    if not name:
        raise NothingToRunError(USAGE)
    if not as_module and not Path(name).exists():
        raise NothingToRunError(f"SCRIPT: got {name}, expected a file; {USAGE}")
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(FOLDER) if not inherited else f"{FOLDER}{os.pathsep}{inherited}"
    # Python puts a program's own folder first; ours comes before it, lest a folder named flash_attn be found there.
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(Path.cwd()) if as_module else str(Path(name).resolve().parent)
    install()
    sys.argv = [name, *rest]
    if as_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")
