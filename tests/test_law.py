"""The laws of docs/design.md and CONTRIBUTING.md, each with a wrong input that its checker must reject."""

from __future__ import annotations

from pathlib import Path

import law
import pytest
import torch
from process import fresh_process

import flashtile
from flashtile.dispatch import load

SOURCES = sorted(law.PACKAGE.rglob("*.py"))
ALL_PYTHON = sorted(
    path for folder in ("src", "tests", "benchmarks", "examples", "shims") for path in (law.ROOT / folder).rglob("*.py")
)
DOCUMENTS = sorted(
    [
        *law.ROOT.glob("*.md"),
        *(path for folder in ("docs", "examples", "shims") for path in (law.ROOT / folder).rglob("*.md")),
    ]
)

# Signatures that belong to somebody else: the user's own words, another library's function, a published algorithm's
# inputs. Everything else keeps to ten arguments.
EXEMPT = {
    "src/flashtile/api.py": {"attention", "attention_varlen"},
    "src/flashtile/integrations/aten_flash.py": {"_sdpa_backward", "_forward", "_backward"},
    "src/flashtile/integrations/flash_attn/functions.py": {
        "flash_attn_func",
        "flash_attn_varlen_func",
        "flash_attn_varlen_kvpacked_func",
        "flash_attn_varlen_qkvpacked_func",
    },
    "src/flashtile/integrations/flash_attn/interface.py": {
        "_flash_attn_backward",
        "_flash_attn_forward",
        "_flash_attn_varlen_backward",
        "_flash_attn_varlen_forward",
    },
    "src/flashtile/integrations/flash_attn/kvcache.py": {"flash_attn_with_kvcache"},
    "src/flashtile/integrations/flash_attn/raw.py": {"bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"},
    "src/flashtile/integrations/transformers.py": {"attention_forward"},
    "src/flashtile/integrations/transformers_masks.py": {"attention_mask_for"},
    "src/flashtile/reference/flash1.py": {"backward"},
    "src/flashtile/reference/flash2_backward.py": {"backward"},
}


def relative(path: Path) -> str:
    return path.relative_to(law.ROOT).as_posix()


def collect(sentences: list[str]) -> str:
    return "\n".join(sentences)


@pytest.fixture(scope="module")
def arrows() -> law.Arrows:
    return law.Arrows.from_document((law.ROOT / "docs" / "design.md").read_text())


def test_imports_follow_the_arrows(arrows: law.Arrows) -> None:
    assert not collect([v for p in SOURCES for v in arrows.violations(law.module_name(p), p.read_text())])


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flashtile.problem", "from flashtile import api"),
        ("flashtile.problem", "from flashtile.api import attention"),
        ("flashtile.problem", "def late():\n    import flashtile.ops"),
        ("flashtile.problem", "from .dispatch import choose"),
        ("flashtile.masks", "from flashtile.merge import merge_states"),
        ("flashtile.integrations.sdpa", "import flashtile"),
        ("flashtile.backends.triton.forward", "from flashtile.backends.blocked import forward"),
        ("flashtile.backends.triton.forward", "from ..blocked import forward"),
        ("flashtile.backends.triton.forward", "from flashtile.reference import standard"),
        ("flashtile.reference.standard", "from flashtile.backends import triton"),
        ("flashtile.nowhere", "import torch"),
        ("flashtile.api", "import flashtile.nowhere"),
    ],
)
def test_imports_against_the_arrows_are_rejected(arrows: law.Arrows, module: str, source: str) -> None:
    assert arrows.violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("flashtile.api", "from flashtile import masks, ops\nimport torch"),
        ("flashtile.backends.triton.forward", "from flashtile.backends.triton import tiles\nfrom . import configs"),
        ("flashtile.cli.demo", "import flashtile\nfrom flashtile.cli import report"),
        ("flashtile", "from flashtile.api import attention"),
    ],
)
def test_imports_along_the_arrows_are_accepted(arrows: law.Arrows, module: str, source: str) -> None:
    assert not arrows.violations(module, source)


def test_arrows_need_their_lines() -> None:
    with pytest.raises(ValueError, match="no line of arrows"):
        law.Arrows.from_document("no arrows here")


def test_files_and_functions_keep_their_budgets() -> None:
    assert not collect([s for path in ALL_PYTHON for s in law.oversized(relative(path), path.read_text())])


def body(lines: int) -> str:
    return "".join("    x = 1\n" for _ in range(lines))


def test_size_budgets_reject() -> None:
    assert law.oversized("f", "x = 1\n" * 501)
    assert not law.oversized("f", "x = 1\n" * 500)
    assert law.oversized("f", "def f():\n" + body(60))
    assert not law.oversized("f", "def f():\n" + body(59))
    assert law.oversized("f", "class A:\n    def f(self):\n" + body(60).replace("    x", "        x"))
    assert law.oversized("f", "@triton.jit\ndef f():\n" + body(120))
    assert not law.oversized("f", "@triton.jit\ndef f():\n" + body(119))
    assert not law.oversized("f", '@jit(debug=True)\ndef f():\n    """One.\n\n    Two.\n    """\n' + body(119))


def test_host_functions_have_at_most_ten_arguments() -> None:
    sentences = [
        s for p in SOURCES for s in law.too_many_arguments(relative(p), p.read_text(), EXEMPT.get(relative(p), set()))
    ]
    assert not collect(sentences)


def test_argument_budget_rejects() -> None:
    ten, eleven = "def f(a, b, c, d, e, f, g, h, *, i, j): 0", "def f(a, b, c, d, e, f, g, h, i, j, *, k): 0"
    assert not law.too_many_arguments("x", ten)
    assert law.too_many_arguments("x", eleven)
    assert not law.too_many_arguments("x", eleven, {"f"})
    assert law.too_many_arguments("x", ten, {"f"}), "an exemption that nobody needs must be rejected"
    assert not law.too_many_arguments("x", "@triton.jit\n" + eleven)


def test_exemptions_name_existing_files() -> None:
    assert not [name for name in EXEMPT if not (law.ROOT / name).is_file()]


def test_at_most_three_environment_variables() -> None:
    names = set().union(*(law.environment_variables(path.read_text()) for path in SOURCES))
    assert "?" not in names
    assert len(names) <= law.ENVIRONMENT_VARIABLES, names


def test_environment_variables_are_found() -> None:
    source = """
os.environ["A"], environ.get("B"), os.getenv("C", "0"), "D" in os.environ, os.environ[name]
"""
    assert law.environment_variables(source) == {"A", "B", "C", "D", "?"}


def test_no_module_without_a_subject() -> None:
    assert not [relative(path) for path in ALL_PYTHON if path.stem in ("utils", "util", "helpers", "misc")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_every_path_named_in_a_document_exists(path: Path) -> None:
    assert not law.missing_paths(path.read_text(), path.parent)


def test_missing_paths_are_found() -> None:
    document = """
See `src/flashtile/api.py`, `masks.py`, `tiles.py`, `gone/file.py`, `docs/` and `nowhere/`, [link](CHANGELOG.md),
[dead](gone.md#top), [web](https://example.org/x.md), `backends/<name>`, `a / b`.
```
python benchmarks/gone.py out/report.html
```
"""
    assert law.missing_paths(document, law.ROOT) == ["benchmarks/gone.py", "gone.md", "gone/file.py", "nowhere/"]


VISIBLE = """
import types, flashtile
names = {n for n, v in vars(flashtile).items() if not n.startswith("_")}
extra = {n for n in names - set(flashtile.__all__) if not isinstance(getattr(flashtile, n), types.ModuleType)}
print(sorted(extra | (set(flashtile.__all__) - names)), flashtile.__all__ == sorted(flashtile.__all__))
"""


def test_all_is_exactly_what_is_visible() -> None:
    # Submodules become attributes by being imported; only those in __all__ are part of the face.
    assert fresh_process(VISIBLE) == "[] True"


def test_an_unlisted_or_absent_name_is_found() -> None:
    stray = VISIBLE.replace("flashtile\n", "flashtile\nflashtile.stray = 1\nflashtile.__all__.append('absent')\n", 1)
    assert fresh_process(stray) == "['absent', 'stray'] False"


LIGHT = """
import sys, flashtile, torch
print("triton" in sys.modules, torch.cuda.is_initialized())
"""


def test_importing_flashtile_is_light() -> None:
    assert fresh_process(LIGHT) == "False False"


def test_a_heavy_import_is_found() -> None:
    pytest.importorskip("triton")
    assert fresh_process("import triton" + LIGHT).startswith("True")


def test_fresh_memory_is_poisoned() -> None:
    base = torch.ones(3)
    strided = torch.empty_strided((3,), (1,)), base.new_empty_strided((3,), (1,))
    fresh = [torch.empty(3), torch.empty_like(base), base.new_empty(3), *strided]
    assert all(bool(tensor.isnan().all()) for tensor in fresh)
    assert bool((torch.empty(3, dtype=torch.int32) > 2**30).all())
    assert not bool(torch.zeros(3).isnan().any())


@pytest.mark.parametrize("name", ["blocked", "reference", "triton"])
def test_a_backend_that_forgets_to_write_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 4, 2, 8)
    monkeypatch.setattr(load(name), "forward", lambda problem, call, out: (out, call.q.new_empty(problem.lse_shape)))
    out, lse = flashtile.attention(q, q, q, return_lse=True, backend=name)
    assert bool(out.isnan().all())
    assert bool(lse.isnan().all())
