"""By which key the portable backend keeps a kernel that Triton has compiled for one call and launches for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

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
