"""What lies between the kernels of the Hopper backward: made and read back in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from places import GPU
from torch import Tensor

from flashtile.backends.hopper import backward_configs, backward_epilogue, backward_pass, backward_prologue
from flashtile.backends.hopper.backward_turns import COUNTERS
from flashtile.gpu import arguments
from flashtile.problem import Call, Problem

pytestmark = pytest.mark.skipif(GPU, reason="this process compiles Triton kernels; a GPU runs whole backwards")

ROWS, HEADS = 100, 2


def problem(dim: int, v_dim: int, right: int | None = None) -> Problem:
    """right: None and the accumulator begins with zeros; 0, a causal mask, and its blocks are stored first."""
    chosen = Problem(
        batch=2, q_len=ROWS, k_len=ROWS, q_heads=HEADS, kv_heads=HEADS, qk_dim=dim, v_dim=v_dim, dtype=torch.bfloat16,
        device="cuda", capability=(9, 0), scale=0.5, window_right=right,
    )  # fmt: skip
    assert backward_configs.cleared(chosen) == (right is None)
    return chosen


def launch(kernel: Any, plan: Any, call: Call, tensors: tuple[Tensor, ...]) -> None:
    passed = (*tensors, *arguments.extras(call))
    kernel[(plan.programs,)](*passed, **{name: plan.values[name] for name in kernel.arg_names[len(passed) :]})


def as_it_leaves(dq: Tensor, columns: int) -> Tensor:
    """dq (rows, D) in the order of the accumulator: parts [64, columns], each as the registers of a product hold it."""
    rows, dim = dq.shape
    parts = dq.reshape(rows // 64, 64, dim // columns, columns).transpose(1, 2)
    parts = parts.reshape(-1, 4, 2, 8, columns // 8, 4, 2).permute(0, 4, 1, 3, 5, 2, 6)
    return parts.reshape(-1, 256).contiguous()


@pytest.mark.parametrize(
    ("dim", "v_dim", "columns"),
    [(40, 40, 64), (128, 128, 128), (160, 120, 192), (192, 128, 192), (192, 192, 256)],
)
def test_dq_is_read_as_it_was_added(dim: int, v_dim: int, columns: int) -> None:
    chosen = problem(dim, v_dim)
    assert backward_configs.accumulator_columns(chosen) == columns
    added = torch.randint(-100, 100, (2, HEADS, 128, columns)).float()
    accumulated = as_it_leaves(added.flatten(0, 2), backward_configs.exit_columns(chosen))
    dq = read(chosen, accumulated, torch.zeros(COUNTERS.value, dtype=torch.int32))
    assert torch.equal(dq.float(), 0.5 * added.transpose(1, 2)[:, :ROWS, :, :dim])


def read(chosen: Problem, accumulated: Tensor, counters: Tensor) -> Tensor:
    """dq as the epilogue makes it."""
    dq = torch.full((2, ROWS, HEADS, chosen.qk_dim), torch.nan, dtype=torch.bfloat16)
    k, v = torch.zeros_like(dq), dq.new_zeros(2, ROWS, HEADS, chosen.v_dim)
    call, tensors = Call(dq, k, v), (accumulated, counters, dq, k, v)
    launch(backward_epilogue.epilogue_kernel, backward_epilogue.prepare(chosen, call, tensors), call, tensors)
    return dq


def test_rows_to_which_nothing_was_written_have_no_gradient() -> None:
    chosen = problem(128, 128, right=0)
    added = torch.randint(-100, 100, (2, HEADS, 2, 64, 128)).float()
    written = torch.tensor([[[3, 0], [3, 3]], [[0, 3], [0, 0]]], dtype=torch.int32)
    accumulated = as_it_leaves(torch.where(written[..., None, None] > 0, added, torch.nan).flatten(0, 3), 64)
    dq = read(chosen, accumulated, torch.cat([torch.zeros(COUNTERS.value, dtype=torch.int32), written.flatten()]))
    expected = torch.where(written[..., None, None] > 0, added, 0.0).flatten(2, 3)
    assert torch.equal(dq.float(), 0.5 * expected.transpose(1, 2)[:, :ROWS])


@pytest.mark.parametrize(("dim", "v_dim"), [(128, 128), (192, 128)])
@pytest.mark.parametrize("right", [None, 0])
def test_counters_begin_with_zeros_and_so_does_what_is_added_to(dim: int, v_dim: int, right: int | None) -> None:
    chosen = problem(dim, v_dim, right)
    q, out = (torch.zeros(2, ROWS, HEADS, width, dtype=torch.bfloat16) for width in (dim, v_dim))
    call, lse = Call(q, q, out), torch.zeros(2, HEADS, ROWS)
    rows, accumulated, counters, sums, _ = backward_pass._scratch(chosen, lse)
    accumulated.fill_(torch.nan)
    counters.fill_(7)
    tensors = (out, out, lse, lse, rows, accumulated, counters, rows, sums)
    plan = backward_prologue.prepare(chosen, call, ("none", False, True), tensors)
    launch(backward_prologue.prologue_kernel, plan, call, tensors)
    assert not counters.any()
    assert counters.numel() == COUNTERS.value + (right == 0) * 2 * HEADS * 2  # two blocks for each head
    # 192 columns with values of 128 begin with zeros from the launch that makes dV, which only a GPU can run.
    untouched = right == 0 or dim > v_dim
    assert accumulated.isnan().all() if untouched else not accumulated.any()


@pytest.mark.parametrize("here", [True, False])
def test_delta_is_made_here_or_left_to_the_launch_for_dv(here: bool) -> None:
    chosen = problem(192, 128)
    q, out, dout = torch.zeros(2, ROWS, HEADS, 192), *torch.randn(2, 2, ROWS, HEADS, 128).bfloat16()
    call, lse = Call(q.bfloat16(), q, out), torch.zeros(2, HEADS, ROWS)
    rows, accumulated, counters, sums, _ = backward_pass._scratch(chosen, lse)
    rows.fill_(torch.nan)
    tensors = (out, dout, lse, lse, rows, accumulated, counters, rows, sums)
    plan = backward_prologue.prepare(chosen, call, ("none", False, here), tensors)
    launch(backward_prologue.prologue_kernel, plan, call, tensors)
    delta = rows[1].reshape(2, HEADS, -1)
    expected = (out.float() * dout.float()).sum(-1).transpose(1, 2)
    assert delta.isnan().all() if not here else torch.allclose(delta[..., :ROWS], expected, atol=1e-4)
