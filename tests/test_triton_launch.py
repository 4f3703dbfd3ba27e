"""By which key the portable backend keeps a kernel that Triton has compiled for a call, and how it is started again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashtile.gpu import arguments
from flashtile.problem import Call
from flashtile.validation import describe


def keys_of(monkeypatch: pytest.MonkeyPatch, *calls: Call) -> list[tuple[Any, ...]]:
    launch = pytest.importorskip("flashtile.backends.triton.launch")
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(launch, "_launch_first", lambda kernel, key, plan, tensors: seen.append(key))
    for call in calls:
        launch.run(None, describe(call), call, call[:3], lambda *_: None)
    return seen


def test_calls_that_differ_in_an_extras_dtype_share_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 8, 2, 16)
    one, same, narrow = (
        Call(q, q, q, sinks=torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.float32, torch.bfloat16)
    )
    assert describe(one) == describe(narrow)
    first, again, other = keys_of(monkeypatch, one, same, narrow)
    assert first == again
    assert first != other


@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_repeated_call_passes_addresses_and_numbers_to_the_current_stream(
    with_sinks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = pytest.importorskip("flashtile.backends.triton.launch")
    q = torch.zeros(1, 8, 2, 16)
    call = Call(q, q, q, sinks=torch.zeros(2) if with_sinks else None)
    (key,) = keys_of(monkeypatch, call)
    seen: list[tuple[Any, ...]] = []
    ready = launch._Ready(lambda device: f"stream of {device}", lambda *given: seen.append(given), (7, 0.5))
    monkeypatch.setattr(launch, "_ready", {key: ready})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: q.device.index)
    launch.run(None, describe(call), call, call[:3], lambda *_: None)
    extras = [q.data_ptr()] * arguments.EXTRAS
    if call.sinks is not None:
        extras[2] = call.sinks.data_ptr()  # behind bias and slopes
    assert seen == [("stream of None", (*[q.data_ptr()] * 3, *extras, 7, 0.5))]
