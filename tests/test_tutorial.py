"""The tutorial's code runs from top to bottom and prints what the page says that it prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def steps(page: str) -> list[tuple[str, str]]:
    """(code, what it prints) of each code block that is followed by its output; every block must be of such a pair."""
    blocks = BLOCK.findall(page)
    kinds = [kind for kind, _ in blocks]
    if kinds != ["python", "text"] * (len(kinds) // 2):
        raise AssertionError(f"blocks do not come in pairs of code and output: {kinds}")
    texts = [text for _, text in blocks]
    return list(zip(texts[::2], texts[1::2], strict=True))


def check_page(page: str) -> None:
    names: dict[str, object] = {}
    for code, expected in steps(page):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(PAGE), "exec"), names)  # noqa: S102 - the page is the project's own
        assert printed.getvalue() == expected, (
            f"after\n{code}\nthe page says\n{expected}\nbut it is\n{printed.getvalue()}"
        )


def test_the_tutorial() -> None:
    page = PAGE.read_text()
    assert len(steps(page)) >= 10
    assert "False" not in page
    check_page(page)


def test_a_wrong_page_is_rejected() -> None:
    right = "```python\nprint(6 * 7)\n```\n\n```text\n42\n```\n"
    check_page(right)
    for wrong in (right.replace("42", "43"), right.replace("text", "python"), right.replace("print(6 * 7)", "6 * 7")):
        with pytest.raises((AssertionError, SyntaxError)):
            check_page(wrong)
