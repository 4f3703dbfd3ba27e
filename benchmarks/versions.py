"""Times other versions of flashtile beside this one: what a change brought, on one card at one temperature.

    git worktree add ../before HEAD~1
    python benchmarks/versions.py before=../before/src -- --grid paper --dims 128 --mode backward --out rows.jsonl

Each version takes part in `flashtile bench` as a peer: it passes the same correctness gate and is timed in turns with
the others, in one process. For that its package is copied under a name of its own, by which its modules import each
other and its torch.library ops are registered. What follows `--` are options of `flashtile bench`.
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from flashtile.cli import roster
from flashtile.cli.commands import app
from flashtile.cli.peers import Flashtile

WORD = re.compile(r"\bflashtile\b")


def imported(name: str, folder: Path, copies: Path) -> ModuleType:
    """The package `flashtile` in a folder as the module flashtile_<name>; copies: where its copy may lie."""
    module = f"flashtile_{name}"
    shutil.copytree(folder / "flashtile", copies / module, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (copies / module).rglob("*.py"):
        file.write_text(WORD.sub(module, file.read_text("utf-8")), "utf-8")
    sys.path.insert(0, str(copies))
    return importlib.import_module(module)


def versions(words: list[str]) -> dict[str, Path]:
    """The folders by name; ValueError for a word that names no version, or by a name that no module can have."""
    found = {}
    for word in words:
        name, _, folder = word.partition("=")
        if not (name and folder and f"flashtile_{name}".isidentifier()):
            raise ValueError(f"got {word!r}, expected NAME=FOLDER, the name of letters, digits and underscores")
        if not (Path(folder) / "flashtile").is_dir():
            raise ValueError(f"got {word!r}, expected a folder that holds the package flashtile")
        found[name] = Path(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+", metavar="NAME=FOLDER", help="a folder that holds a package flashtile")
    parser.add_argument("options", nargs="*", help="options of `flashtile bench`, after --")
    words = sys.argv[1:]
    border = words.index("--") if "--" in words else len(words)
    chosen = parser.parse_args(words[:border])
    try:
        found = versions(chosen.versions)
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as copies:
        for name, folder in found.items():
            package = imported(name, folder, Path(copies))
            roster.OTHERS[name] = Flashtile(package=package, name=name)
        app(["bench", "--peers", ",".join(found), *words[border + 1 :]])


if __name__ == "__main__":
    main()
