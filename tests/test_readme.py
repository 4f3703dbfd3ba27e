"""The README: its code runs as it stands, its commands exist, and the two that matter come first."""

from __future__ import annotations

import re
from pathlib import Path

import law
import pytest

README = (law.ROOT / "README.md").read_text()


def blocks(document: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document, re.MULTILINE | re.DOTALL)


def run(block: str) -> None:
    """Runs a block as a reader would paste it: on its own."""
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})  # noqa: S102


def test_there_is_code_to_run() -> None:
    assert len(blocks(README, "python")) >= 4
    assert README.count("```") == 2 * (len(blocks(README, "python")) + len(blocks(README, "console")))


@pytest.mark.parametrize("block", blocks(README, "python"), ids=range(len(blocks(README, "python"))))
def test_python_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(block)


def test_a_block_that_does_not_run_is_found() -> None:
    wrong = blocks(README, "python")[0].replace("causal=True", "casual=True")
    with pytest.raises(TypeError, match="casual"):
        run(wrong)


def test_the_two_commands_come_first() -> None:
    first, *_ = blocks(README, "console")
    assert re.findall(r"^make (\w+)", first, re.MULTILINE) == ["demo", "test"]
    assert README.index("make demo") < 40


def missing_targets(document: str, makefile: Path) -> set[str]:
    """Targets of make that the document names and the Makefile lacks."""
    named = set(re.findall(r"(?:^|`)make (\w+)", document, re.MULTILINE))
    return named - set(re.findall(r"^(\w+):", makefile.read_text(), re.MULTILINE))


def test_named_targets_of_make_exist() -> None:
    assert not missing_targets(README, law.ROOT / "Makefile")
    assert missing_targets("`make demo` and `make coffee`", law.ROOT / "Makefile") == {"coffee"}


def test_named_commands_are_those_of_the_command_line() -> None:
    from flashtile.cli.commands import app

    table = re.findall(r"^\| `flashtile (\w+)` \|", README, re.MULTILINE)
    assert sorted(table) == sorted(str(command.name) for command in app.registered_commands)


def test_every_line_of_the_feature_table_is_complete() -> None:
    section = README.partition("\n## Features\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    assert len(rows) > 20
    assert {line.count("|") for line in rows} == {8}
