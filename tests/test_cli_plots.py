"""Plots of bench rows: the files exist, are pictures with something on them, and only measured rows are drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from flashtile.cli import grids, plots
from flashtile.cli.commands import app
from flashtile.cli.console import UsageError
from flashtile.cli.workload import Workload


def row(work: Workload, peer: str, mode: str, speed: float, **changes: Any) -> dict[str, Any]:
    """A row as bench writes it, of a device that does not exist."""
    return {
        "case": work.id,
        "feature": work.feature,
        "peer": peer,
        "own": peer.startswith("flashtile"),
        "mode": mode,
        "dtype": "bfloat16",
        "call": json.loads(json.dumps(vars(work))),
        "status": "measured",
        "ms": 1.0,
        "ms_q20": 0.9,
        "ms_q80": 1.2,
        "tflops": speed,
        "extra_bytes": work.q_len * 1000,
        "limits": {"matmul_tflops": 800.0, "copy_gbps": 3000.0},
        "device": {"name": "Imaginary GPU"},
        **changes,
    }


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    works = grids.sequence_grid("paper", lengths=[1024, 2048, 4096], dims=[64, 128])
    works += grids.sequence_grid("paper", lengths=[4096], dims=[64], features=["alibi", "softcap"])
    works += grids.model_grid("gemma,flux")
    return write(
        tmp_path / "rows.jsonl",
        [
            row(work, peer, mode, 100 + 50 * place + work.q_len / 50)
            for work in works
            for mode in ("forward", "backward")
            for place, peer in enumerate(("sdpa-flash", "flash4", "flashtile", "somebody-new"))
        ],
    )


def test_every_chart_is_a_picture_with_something_on_it(rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    result = CliRunner().invoke(app, ["bench", "--plot", str(rows), "--plot-out", str(folder), "--json"])
    assert result.exit_code == 0, result.output
    paths = [Path(path) for path in json.loads(result.stdout)["plots"]]
    suffix = "bfloat16-imaginary-gpu.png"
    assert {path.name for path in paths} == {
        f"{name}-{suffix}"
        for name in (
            "plain-forward",
            "plain-backward",
            "plain-memory",
            "features-forward",
            "features-backward",
            "models-forward",
            "models-backward",
        )
    }
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        picture = imread(path)
        assert min(picture.shape[:2]) > 300
        drawn = (picture[..., :3].min(-1) < 0.9).mean()
        assert 0.01 < drawn < 0.6
        # flashtile's red line or mark is there.
        red = (picture[..., 0] > 0.7) & (picture[..., 1] < 0.3) & (picture[..., 2] < 0.3)
        assert red.sum() > 50


def test_the_last_of_equal_rows_counts(tmp_path: Path) -> None:
    work = grids.sequence_grid("quick", [64], [32], causal=True)[0]
    path = write(tmp_path / "r.jsonl", [row(work, "flashtile", "forward", speed) for speed in (1.0, 2.0, 3.0)])
    assert [one["tflops"] for one in plots.read(path)] == [3.0]


def test_rows_without_a_speed_are_not_drawn(tmp_path: Path) -> None:
    work = grids.sequence_grid("quick", [64], [32], causal=True)[0]
    path = write(tmp_path / "r.jsonl", [row(work, "sdpa", "forward", 1.0, status="wrong")])
    with pytest.raises(UsageError, match="no measured rows"):
        plots.draw(path, tmp_path)


@pytest.mark.parametrize("text", ["not json\n", '{"case": 1}\n', "[]\n"])
def test_what_is_no_row_is_a_usage_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match="line 1 of .* is no row of bench"):
        plots.draw(path, tmp_path)
