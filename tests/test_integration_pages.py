"""The pages on PyTorch, transformers, timm and diffusers: every snippet runs as it stands, and prints what it says."""

from __future__ import annotations

import importlib
import re

import law
import pytest
import torch.nn.functional as F

PAGES = ("pytorch", "transformers", "timm_diffusers")
FOLDER = law.ROOT / "docs" / "integrations"


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def run(snippet: str) -> list[str]:
    """Runs a snippet as a reader would paste it; what it says beside each `print`, in order."""
    exec(compile(snippet, "docs", "exec"), {"__name__": "__main__"})  # noqa: S102
    return re.findall(r"^\s*print\(.*\)  # (.*)$", snippet, re.MULTILINE)


def why_not(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit is the latter
        return f"{module} cannot be imported: {error}"
    return None


def check(snippet: str, capsys: pytest.CaptureFixture[str]) -> None:
    missing = filter(None, map(why_not, re.findall(r"^import (\w+)", snippet, re.MULTILINE)))
    if reason := next(missing, None):
        pytest.skip(reason)
    capsys.readouterr()
    said = run(snippet)
    assert capsys.readouterr().out.splitlines() == said


SNIPPETS = [
    (page, number, text) for page in PAGES for number, text in enumerate(snippets((FOLDER / f"{page}.md").read_text()))
]


@pytest.mark.parametrize(("page", "number", "text"), SNIPPETS, ids=[f"{page}-{number}" for page, number, _ in SNIPPETS])
def test_snippets_run(page: str, number: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = F.scaled_dot_product_attention
    check(text, capsys)
    assert F.scaled_dot_product_attention is before, "a snippet that replaces PyTorch's function gives it back"


def test_each_page_has_snippets() -> None:
    assert {page for page, *_ in SNIPPETS} == set(PAGES)


def test_a_wrong_snippet_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AssertionError):
        check("import torch\nprint(torch.ones(2).shape)  # torch.Size([3])\n", capsys)
    with pytest.raises(TypeError, match="casual"):
        check("import torch, flashtile\nflashtile.attention(*[torch.ones(1, 2, 1, 8)] * 3, casual=True)\n", capsys)
