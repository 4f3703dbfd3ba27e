"""The report of `flashtile demo --quick`, run once: complete, from its result alone, and well rendered by a browser."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import chromium
import pytest
import torch
from filelock import FileLock

from flashtile.cli import demo
from flashtile.cli.demo import main, plots, report, scaling, settings
from flashtile.cli.demo.attentions import ATTENTIONS

# Continuous integration installs the browser, so a missing one is a fault there; a contributor may do without.
needs_chromium = pytest.mark.skipif(
    chromium.PROGRAM is None and "CI" not in os.environ, reason="Chromium is not installed on this machine"
)
VIEWS = ((False, 1200), (True, 1200), (False, 420))  # dark or not, width of the window


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """The report of one quick run through the command line, shared by all workers of a parallel test run."""
    root = tmp_path_factory.getbasetemp()
    root = root if worker_id == "master" else root.parent
    out = root / "report"
    with FileLock(root / "report.lock"):
        if not (root / "printed.json").exists():
            command = [sys.executable, "-m", "flashtile", "demo", "--quick", "--json", "--out", str(out)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
            (root / "printed.json").write_text(done.stdout)
    return out


@pytest.fixture
def result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "report.json").read_text()))


def test_a_quick_run_passes_all_its_checks(result: dict[str, Any]) -> None:
    assert result["ok"]
    assert [check["ok"] for check in result["checks"]] == [True, True, True]
    assert result["quick"]


def test_what_is_printed_is_what_is_written(folder: Path, result: dict[str, Any]) -> None:
    printed = json.loads((folder.parent / "printed.json").read_text())
    assert Path(printed.pop("report")) == folder / "report.html"
    assert printed == result


def test_every_attention_is_measured_at_every_length(result: dict[str, Any]) -> None:
    rows = result["scaling"]["rows"]
    keys = {(row["attention"], row["mode"], row["length"]) for row in rows}
    lengths = settings.QUICK.scaling.lengths
    assert keys == {(name, mode, n) for name in ATTENTIONS for mode in scaling.MODES for n in lengths}
    assert len(rows) == len(keys)
    assert all(row["milliseconds"]["median"] > 0 for row in rows)
    if sys.platform == "linux":
        assert all(row["peak_bytes"] is not None for row in rows)


def test_the_default_backend_is_the_one_that_is_checked(result: dict[str, Any]) -> None:
    backends = {row["backend"] for row in result["exactness"]["rows"]}
    assert backends == ({"triton"} if torch.cuda.is_available() else {"blocked"})


def test_training_learns_more_than_byte_frequencies_start_with(result: dict[str, Any]) -> None:
    runs = result["training"]["runs"]
    assert set(runs) == set(ATTENTIONS)
    for run in runs.values():
        assert len(run["losses"]) == settings.QUICK.training.steps
        assert run["losses"][0] == pytest.approx(math.log(256), abs=0.2)
        assert run["losses"][-1] < run["losses"][0] - 0.3


def test_all_files_of_the_report_are_written(folder: Path) -> None:
    names = {"report.html", "report.json", "scaling-time.png", "scaling-memory.png", "training-loss.png"}
    assert {path.name for path in folder.iterdir()} == names


def test_every_number_of_the_page_comes_from_the_result(folder: Path, result: dict[str, Any]) -> None:
    written = (folder / "report.html").read_text()
    images = plots.draw(result)
    assert report.page(result, images) == written
    changed = copy.deepcopy(result)
    changed["scaling"]["rows"][0]["milliseconds"]["median"] = 123.0
    assert report.page(changed, images) != written


def test_show_prints_the_summary(result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    demo.show(result | {"report": "folder/report.html"})
    printed = capsys.readouterr().out
    assert printed.count("passed") == 3
    assert "folder/report.html" in printed
    result["checks"][0]["ok"] = False
    demo.show(result | {"report": ""})
    assert "FAILED" in capsys.readouterr().out


def test_checks_name_what_is_wrong(result: dict[str, Any]) -> None:
    result["exactness"]["rows"][0]["ok"] = False
    verdicts = main.checks(result)
    assert [verdict["ok"] for verdict in verdicts] == [False, True, True]
    assert result["exactness"]["rows"][0]["case"] in verdicts[0]["detail"]


def flaws(page: Path, folder: Path, views: tuple[tuple[bool, int], ...] = VIEWS) -> list[str]:
    """What is wrong with a report page once a browser has rendered it; profile and screenshots go to `folder`."""
    found = []
    with chromium.browser(folder / "profile") as browser:
        for dark, width in views:
            browser.open(page, width, dark)
            name = f"{'dark' if dark else 'light'}-{width}"
            shot = browser.screenshot(folder / f"{name}.png")
            found += [f"{name}: {sentence}" for sentence in _rendering_flaws(browser, width)]
            if len(shot) < 20_000:
                found.append(f"{name}: an empty screenshot")
        found += browser.complaints
        found += [url for url in browser.requests if not url.startswith(("file://", "data:"))]
    return found


def _rendering_flaws(browser: chromium.Browser, width: int) -> list[str]:
    dom = browser.dom()
    found = [
        f"no heading {title}" for title in ("Exactness", "Time and memory", "Training a small GPT") if title not in dom
    ]
    widths = browser.evaluate("[...document.images].map(image => image.naturalWidth)")
    if len(widths) != 3 or not all(widths):
        found.append(f"images of widths {widths}")
    rows = browser.evaluate("[...document.querySelectorAll('table')].map(t => t.querySelectorAll('tbody tr').length)")
    if len(rows) != 6 or not all(rows):
        found.append(f"tables of {rows} rows")
    if browser.evaluate("document.documentElement.scrollWidth") > width:
        found.append("the page is wider than its window")
    return found


@needs_chromium
def test_the_page_renders_without_errors_or_requests(folder: Path, tmp_path: Path) -> None:
    assert not flaws(folder / "report.html", tmp_path)


@needs_chromium
@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("<img src='data:image/png;base64,", "<img src='data:image/png;base64,AAAA", "images of widths"),
        ("</main>", "<script>console.error('oops')</script></main>", "oops"),
        ("</main>", "<script>undefined_name()</script></main>", "undefined_name"),
        ("</main>", "<img src='http://192.0.2.1/x.png' hidden></main>", "http://192.0.2.1/x.png"),
        ("<tbody>", "<tbody hidden></tbody><!--", "tables of"),
        ("<main>", "<main style='width: 3000px; max-width: none'>", "wider than its window"),
        ("1. Exactness", "", "no heading Exactness"),
    ],
)
def test_a_broken_page_is_rejected(folder: Path, tmp_path: Path, old: str, new: str, said: str) -> None:
    page = tmp_path / "broken.html"
    page.write_text((folder / "report.html").read_text().replace(old, new))
    assert said in "\n".join(flaws(page, tmp_path, VIEWS[:1]))
