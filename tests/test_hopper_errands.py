"""What the launches for dV do for the one for dK and dQ, in the backward of latent attention on Hopper."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from places import hopper_plans_anew, on_hopper

import flashtile
from flashtile.backends.hopper import backward_configs
from flashtile.masks import Causal
from flashtile.problem import Problem
from flashtile.testing import Case, run_case

LATENT = Problem(
    batch=1, q_len=4096, k_len=4096, q_heads=128, kv_heads=128, qk_dim=192, v_dim=128, dtype=torch.bfloat16,
    device="cuda", capability=(9, 0), scale=192**-0.5, window_right=0,
)  # fmt: skip

TWO_HALVES = ["delta", "none", "dq"]


@pytest.mark.parametrize(
    ("changes", "errands"),
    [
        ({}, TWO_HALVES),
        ({"window_right": None}, TWO_HALVES),
        ({"deterministic": True}, TWO_HALVES),
        ({"dtype": torch.float16}, ["none", "none", "dq"]),  # its prologue measures dO
        ({"q_len": 2047}, ["delta", "none"]),
        ({"k_len": 2047}, ["delta", "none"]),
        ({"q_heads": 16, "kv_heads": 16}, ["delta", "none"]),
        ({"q_heads": 1, "kv_heads": 1, "k_len": 10**6}, ["delta", "none"]),
        ({"q_len": 1023}, ["none", "none"]),
        ({"window_left": 4000}, ["none", "none"]),
        ({"sinks": True}, ["none", "none"]),
        ({"dropout_p": 0.1}, ["none", "none"]),
        ({"alibi": True}, ["none", "none"]),
        ({"varlen": True, "total_q": 9, "total_k": 9}, ["none", "none"]),
        ({"v_dim": 192}, ["none"]),
    ],
)
def test_errands_are_run_where_there_is_time(changes: dict[str, Any], errands: list[str]) -> None:
    launches = backward_configs.launches(replace(LATENT, **changes))
    assert [one.errand for one in launches] == errands
    with_dlse = backward_configs.launches(replace(LATENT, **changes), dlse=True)
    assert [one.errand for one in with_dlse] == [errand if errand == "dq" else "none" for errand in errands]


@pytest.mark.parametrize(("batch", "q_heads", "kv_heads"), [(1, 128, 128), (3, 43, 43), (8, 64, 16)])
def test_each_gradient_of_each_head_is_made_once(batch: int, q_heads: int, kv_heads: int) -> None:
    launches = backward_configs.launches(replace(LATENT, batch=batch, q_heads=q_heads, kv_heads=kv_heads))
    assert len({one.name for one in launches}) == len(launches) == 3
    for makes in ("values", "keys"):
        parts = [range(one.first_head, one.first_head + one.heads) for one in launches if one.makes == makes]
        assert [head for part in parts for head in part] == [*range(batch * kv_heads)]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Errands are run whether there is time or not."""
    monkeypatch.setattr(backward_configs, "_has_time", lambda problem, rows: problem.bare)
    monkeypatch.setattr(backward_configs, "_ITEMS_OF_TWO", 0)
    with hopper_plans_anew():
        yield


_CASE = Case("errands", "two heads each", q_len=500, k_len=500, heads=4, dim=192, v_dim=128, mask=Causal())


@pytest.mark.gpu(seconds=60.0)
@on_hopper
@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        _CASE,
        replace(_CASE, id="errands-full", why="no mask", mask=None, q_len=300, k_len=410, dlse=True),
        replace(_CASE, id="errands-grouped", why="shared keys", heads=6, kv_heads=3, batch=3),
        replace(_CASE, id="errands-odd", why="head dims that are no tiles'", dim=136, v_dim=72),
        replace(_CASE, id="errands-blind", why="rows that see nothing", q_len=900, k_len=300, deterministic=True),
        replace(_CASE, id="errands-most", why="more portions than steps", q_len=3000, k_len=40, mask=None),
        replace(_CASE, id="errands-one", why="no two halves", heads=1, batch=1),
    ],
    ids=str,
)
def test_errands_are_exact(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "hopper", dtype, "cuda")  # whose memory is NaN before it is written


@pytest.mark.gpu(seconds=60.0)
@on_hopper
@pytest.mark.usefixtures("hurried")
def test_errands_reach_gradients_that_lie_apart() -> None:
    """Strides of O, dO and dQ, the innermost too, are the tensors' own."""
    q, k, v, dout = (torch.randn(2, 4, 200, dim, device="cuda", dtype=torch.bfloat16) for dim in (192, 192, 128, 128))
    apart = [x.transpose(1, 2).requires_grad_() for x in (q, k, v)]
    dense = [x.detach().contiguous().requires_grad_() for x in apart]
    dout = dout.transpose(2, 3).contiguous().transpose(2, 3).transpose(1, 2)
    for inputs, grad in ((apart, dout), (dense, dout.contiguous())):
        flashtile.attention(*inputs, causal=True, deterministic=True, backend="hopper").backward(grad)
    for one, other in zip(apart, dense, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@pytest.mark.gpu(seconds=120.0)
@on_hopper
def test_errands_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At their own size, 50 times to the bit. Beside no errands dV to the bit, dK and dQ to delta's rounding, of which
    nothing was seen at 1024 and 4096 rows.
    """
    q, k, v, dout = (torch.randn(1, 2048, 96, dim, device="cuda", dtype=torch.bfloat16) for dim in (192, 192, 128, 128))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = flashtile.attention(*inputs, causal=True, deterministic=True, backend="hopper")
    found = torch.autograd.grad(out, inputs, dout, retain_graph=True)
    for _ in range(50):
        again = torch.autograd.grad(out, inputs, dout, retain_graph=True)
        assert all(map(torch.equal, found, again))
    monkeypatch.setattr(backward_configs, "_has_time", lambda problem, rows: False)
    with hopper_plans_anew():
        plain = torch.autograd.grad(out, inputs, dout)
    assert torch.equal(found[2], plain[2])
    for one, other in zip(found, plain, strict=True):
        assert (one.float() - other.float()).norm() / other.float().norm() < 1e-5
