"""The pages about flash_attn: their code runs as it stands, and they name every name that is served."""

from __future__ import annotations

import importlib

import pytest
from law import ROOT
from process import fresh_process
from test_readme import blocks

PAGES = ("docs/integrations/flash_attn.md", "examples/migrate_from_flash_attn.md")
BLOCKS = [
    (page, index, code) for page in PAGES for index, code in enumerate(blocks((ROOT / page).read_text(), "python"))
]


def test_there_is_code_to_run() -> None:
    assert [sum(where == page for where, _, _ in BLOCKS) for page in PAGES] == [2, 3]


@pytest.mark.parametrize(("page", "index", "code"), BLOCKS, ids=[f"{page}-{index}" for page, index, _ in BLOCKS])
def test_code_runs_as_it_stands(page: str, index: int, code: str) -> None:
    fresh_process(code)


def test_code_that_does_not_run_is_found() -> None:
    with pytest.raises(AssertionError, match="NameError"):
        fresh_process("flash_attn.install()")


def test_every_served_name_is_on_the_page() -> None:
    """The names themselves, or what the page says in their place."""
    page = (ROOT / PAGES[0]).read_text()
    said_otherwise = (
        "FlashAttn",
        "_wrapped",
        "flash_attn_",
        "IndexFirst",
        "IndexPut",
        "index_",
        "Apply",
        "apply_rotary_emb",
    )
    for module in ("interface", "bert_padding"):
        names = importlib.import_module(f"flashtile.integrations.flash_attn.{module}").__all__
        assert not [name for name in names if not name.startswith(said_otherwise) and f"`{name}`" not in page]
