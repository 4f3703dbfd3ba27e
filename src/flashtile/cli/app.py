"""The entry point of `flashtile` and `python -m flashtile`: importable without the packages of the `cli` extra."""

from __future__ import annotations

import sys

NEEDED = ("typer", "rich")
USAGE_ERROR = 2


def main() -> None:
    """Runs the command line; ends the process with 0 (ok), 1 (a check failed) or 2 (usage error).

    `run` needs none of these packages, and the program that it runs may end as it likes.
    """
    if sys.argv[1:2] == ["run"] and sys.argv[2:3] != ["--help"]:
        _run(sys.argv[2:])
        return
    try:
        from flashtile.cli.commands import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in NEEDED:
            raise
        print(f"flashtile: the command line needs {package}: pip install flashtile[cli]", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
    app()


def _run(arguments: list[str]) -> None:
    from flashtile.cli.run import NothingToRunError, run

    try:
        run(arguments)
    except NothingToRunError as error:
        print(f"flashtile: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
