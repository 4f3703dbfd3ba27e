"""The parts of `flashtile demo`, and wrong attentions that must turn its checks red."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import flashtile
from flashtile.backends import blocked
from flashtile.cli import demo
from flashtile.cli.console import UsageError
from flashtile.cli.demo import exactness, scaling, settings, text, training
from flashtile.cli.demo.attentions import ATTENTIONS, TITLES
from flashtile.cli.demo.gpt import GPT, write
from flashtile.cli.demo.memory import Peak, peak

TINY = settings.Training(
    layers=1, heads=2, width=32, context=48, batch=2, steps=12, windows=2, sampled=4, learning_rate=2e-2, warm_up=1
)


def silent(description: str, advance: int = 0) -> None:
    """A step of progress that nobody sees."""


def exactness_rows() -> list[dict[str, Any]]:
    return list(exactness.run(replace(settings.QUICK.exactness, cases=("dim-64",)), "cpu", silent)["rows"])


def test_the_right_backend_is_exact() -> None:
    rows = exactness_rows()
    assert len(rows) == 2
    assert all(row["ok"] and 0 < row["share"] <= 1 for row in rows)


def test_a_slightly_wrong_scale_fails_exactness(monkeypatch: pytest.MonkeyPatch) -> None:
    right = blocked.forward

    def wrong(problem: Any, call: Any, out: Any = None) -> Any:
        return right(replace(problem, scale=1.001 * problem.scale), call._replace(scale=1.001 * call.scale), out)

    monkeypatch.setattr(blocked, "forward", wrong)
    assert {row["dtype"] for row in exactness_rows() if not row["ok"]} >= {"float32"}


def test_a_wrong_gradient_alone_fails_exactness(monkeypatch: pytest.MonkeyPatch) -> None:
    right = blocked.backward

    def wrong(*arguments: Any) -> Any:
        returned = right(*arguments)
        _, dk, _ = arguments[6]
        dk.mul_(1.1)
        return returned

    monkeypatch.setattr(blocked, "backward", wrong)
    rows = exactness_rows()
    assert not any(row["ok"] for row in rows)
    assert all(row["errors"]["dk"]["share"] > 1 >= row["errors"]["dv"]["share"] for row in rows)


def test_an_error_in_one_case_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        raise MemoryError("no tile fits")

    monkeypatch.setattr(blocked, "forward", wrong)
    rows = exactness_rows()
    assert [row["reason"] for row in rows] == ["MemoryError: no tile fits"] * 2
    assert not any(row["ok"] for row in rows)


def test_nan_fails_exactness(monkeypatch: pytest.MonkeyPatch) -> None:
    right = blocked.forward

    def wrong(*arguments: Any) -> Any:
        out, lse = right(*arguments)
        return out.fill_(torch.nan), lse

    monkeypatch.setattr(blocked, "forward", wrong)
    rows = exactness_rows()
    assert not any(row["ok"] for row in rows)
    assert all("nan" in row["reason"].lower() for row in rows)


def train_with(
    attend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """How training with `attend` in flashtile's place differs from training with standard attention."""
    monkeypatch.setitem(ATTENTIONS, "flashtile", attend)
    monkeypatch.setattr(training, "peak", lambda *_: Peak(None, "not measured here"))
    content = text.read(None, TINY.context + 1)
    return dict(training.run(TINY, content, "cpu", dtype, silent)["differences"]["flashtile"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_attention_trains_alike(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    difference = train_with(ATTENTIONS["flashtile"], monkeypatch, dtype)
    assert difference["gradient_ok"]
    assert difference["curves_ok"]


def looks_ahead(q: Any, k: Any, v: Any) -> Any:
    """Forgets the causal mask, so the model sees the byte that it should guess."""
    return flashtile.attention(q, k, v)


def of_twice_the_scale(q: Any, k: Any, v: Any) -> Any:
    return flashtile.attention(q, k, v, causal=True, scale=2 * q.shape[-1] ** -0.5)


def without_gradient_of_keys(q: Any, k: Any, v: Any) -> Any:
    return flashtile.attention(q, k.detach(), v, causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attend", [looks_ahead, of_twice_the_scale, without_gradient_of_keys])
def test_wrong_attention_trains_otherwise(attend: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    difference = train_with(attend, monkeypatch, dtype)
    assert not difference["curves_ok"]
    # Scores are near 0 before any training, and errors of their scale then drown in bfloat16's roundings.
    if dtype == torch.float32:
        assert not difference["gradient_ok"]


def test_a_wild_control_widens_the_tolerance_and_a_nan_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    right, sdpa = ATTENTIONS["flashtile"], ATTENTIONS["sdpa"]
    assert train_with(right, monkeypatch)["loss_tolerance"] == training.LOSS_TOLERANCE
    monkeypatch.setitem(ATTENTIONS, "sdpa", looks_ahead)
    assert train_with(right, monkeypatch)["loss_tolerance"] > training.LOSS_TOLERANCE
    monkeypatch.setitem(ATTENTIONS, "sdpa", lambda q, k, v: sdpa(q, k, v) * torch.nan)
    assert train_with(right, monkeypatch)["loss_tolerance"] == training.LOSS_TOLERANCE


def test_a_nan_loss_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    difference = train_with(lambda q, k, v: ATTENTIONS["sdpa"](q, k, v) * torch.nan, monkeypatch)
    assert not difference["gradient_ok"]
    assert not difference["curves_ok"]


def test_a_failed_check_fails_the_command_and_shows_on_the_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flashtile.cli.commands import app

    small = replace(settings.QUICK.scaling, lengths=(32,))
    monkeypatch.setattr(settings, "QUICK", replace(settings.QUICK, scaling=small, training=TINY))
    monkeypatch.setitem(ATTENTIONS, "flashtile", looks_ahead)
    with pytest.raises(SystemExit) as ended:
        app(["demo", "--quick", "--out", str(tmp_path / "report")], standalone_mode=True)
    assert ended.value.code == 1
    assert "FAILED" in capsys.readouterr().out
    page = (tmp_path / "report" / "report.html").read_text()
    assert "A check failed" in page
    assert "All checks passed" not in page


def allocate(count: int) -> Any:
    torch.ones(count // 100, dtype=torch.uint8)  # the threads and the code are there before the measurement starts
    return partial(torch.ones, count, dtype=torch.uint8)


def end_of_process() -> Any:
    return partial(os._exit, 9)


def failure() -> Any:
    return partial(torch.ones, -1)


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of other systems is not known to the byte")
def test_peak_memory_is_measured_truly() -> None:
    measured = peak(partial(allocate, 96 * 2**20), "cpu").bytes
    assert measured is not None
    assert measured == pytest.approx(96 * 2**20, abs=4 * 2**20)


def test_a_probe_that_fails_or_dies_says_so() -> None:
    assert peak(failure, "cpu").reason is not None
    died = peak(end_of_process, "cpu")
    assert died.bytes is None
    assert "exit code 9" in str(died.reason)


@pytest.mark.parametrize(
    ("limit", "said"), [({"memory_share": 1e-9}, "would need about"), ({"call_seconds": 0.0}, "would take about")]
)
def test_unreasonable_calls_are_left_out_with_the_reason(
    limit: dict[str, float], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "peak", lambda *_: Peak(10**6))
    tiny = replace(settings.QUICK.scaling, lengths=(16, 32, 64), **limit)
    rows = scaling.run(tiny, "cpu", torch.float32, silent)["rows"]
    by_length = {n: [row for row in rows if row["length"] == n] for n in tiny.lengths}
    assert all(row["milliseconds"] is not None for row in by_length[16])
    assert all(row["milliseconds"] is None and said in row["reason"] for row in by_length[32])
    assert all(row["milliseconds"] is None and "as 32 tokens were" in row["reason"] for row in by_length[64])


def test_the_text_of_a_file_is_split_without_overlap(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(bytes(range(100)))
    content = text.read(str(file), 5)
    assert content.training.tolist() == list(range(90))
    assert content.held_out.tolist() == list(range(90, 100))


@pytest.mark.parametrize("size", [0, 40])
def test_a_short_text_is_refused(tmp_path: Path, size: int) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"x" * size)
    with pytest.raises(UsageError, match="expected at least 129"):
        demo.run(demo.Options(text=str(file), out=str(tmp_path / "out"), quick=True))
    assert not (tmp_path / "out").exists()


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="readable file"):
        text.read(str(tmp_path / "none"), 1)


def test_the_standard_library_is_text_enough() -> None:
    content = text.read(None, 2000)
    assert content.files > 100
    assert content.training.numel() > 4 * content.held_out.numel() > 0


def test_byte_entropy() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8)
    assert text.byte_entropy(every_byte) == pytest.approx(math.log(256))
    assert text.byte_entropy(torch.zeros(9, dtype=torch.uint8)) == 0


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_model_is_causal_and_depends_on_the_seed_alone(name: str) -> None:
    model = GPT(TINY, ATTENTIONS[name])
    other = GPT(TINY, ATTENTIONS["standard"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    content = torch.randint(256, (1, 20))
    changed = content.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 256
    before, after = model(content), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12])
    assert not torch.allclose(before[:, 12:], after[:, 12:])
    torch.testing.assert_close(before, other(content))


def test_writing_is_repeatable_and_of_the_asked_length() -> None:
    model = GPT(TINY, ATTENTIONS["flashtile"])
    written = write(model, b"ab", 60, TINY.context, "cpu")
    assert len(written) == 62
    assert written.startswith(b"ab")
    assert written == write(model, b"ab", 60, TINY.context, "cpu")


def test_titles_cover_all_attentions() -> None:
    assert list(TITLES) == list(ATTENTIONS)
