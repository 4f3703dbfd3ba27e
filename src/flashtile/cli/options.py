"""One dataclass describes a command's options; this turns it into the signature that Typer reads.

A field's metadata may hold `help`, `names` (option names other than the field's own) and `argument` (positional).
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from flashtile.cli.console import Result, UsageError, print_json

FAILED = 1


def option(default: Any, text: str, *names: str) -> Any:
    """A dataclass field that becomes an option."""
    return dataclasses.field(default=default, metadata={"help": text, "names": names})


def argument(text: str) -> Any:
    """A dataclass field that becomes the command's positional arguments."""
    return dataclasses.field(default_factory=list, metadata={"help": text, "argument": True})


def command(
    options: type[Any], run: Callable[[Any], Result], show: Callable[[Result], None], text: str
) -> Callable[..., None]:
    """A function for Typer: fills `options` from the command line, runs, prints, and exits 1 where ok is false."""

    def invoke(**values: Any) -> None:
        as_json = values.pop("as_json")
        try:
            result = run(options(**values))
        except UsageError as error:
            raise typer.BadParameter(str(error)) from None
        print_json(result) if as_json else show(result)
        if not result["ok"]:
            raise typer.Exit(FAILED)

    hints = get_type_hints(options)
    parameters = [_parameter(field, hints[field.name]) for field in dataclasses.fields(options)]
    parameters.append(_keyword("as_json", bool, False, typer.Option("--json", help="Print the result as JSON.")))
    # Typer reads a function's signature and annotations; ours come from the dataclass.
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    invoke.__doc__ = text
    return invoke


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    if field.metadata.get("argument"):
        return _keyword(field.name, hint, inspect.Parameter.empty, typer.Argument(help=field.metadata["help"]))
    names = field.metadata["names"]
    if hint is bool and not names:
        names = (f"--{field.name.replace('_', '-')}",)  # a plain flag, without a --no- twin
    return _keyword(field.name, hint, field.default, typer.Option(*names, help=field.metadata["help"]))


def _keyword(name: str, hint: Any, default: Any, info: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, info])
