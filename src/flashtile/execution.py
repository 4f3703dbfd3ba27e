"""Running one call: check it, choose a backend, run it. Both ways into attention, thin and dispatched, end here."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flashtile.dispatch import choose, load
from flashtile.merge import sink_gradient
from flashtile.problem import Call, Problem, separate, unpack
from flashtile.validation import check_cu_seqlens_values, describe

Gradients = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def run_forward(call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call whose tensors are plain ones with memory."""
    call = unpack(call)
    return forward(describe(call), call, out)


def forward(problem: Problem, call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of an unpacked call that was found to be in order."""
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None and problem.device == "cpu":
        check_cu_seqlens_values("cu_seqlens_q", call.cu_seqlens_q, problem.total_q, problem.q_len)
        check_cu_seqlens_values("cu_seqlens_k", call.cu_seqlens_k, problem.total_k, problem.k_len)
    out = empty_out(call.q, problem) if out is None else out
    if problem.empty:
        return _forward_of_nothing(problem, call, out)
    return load(choose(problem, call.backend)).forward(problem, call, out)


def run_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    *fields: Any,
    problem: Problem | None = None,
) -> Gradients:
    """Gradients of q, k, v (packed as the inputs were), bias and sinks; None for what the call does not have.

    problem: the call's, where it is known.
    """
    call = Call(*fields)
    grads = empty_gradients(call)
    dbias, dsinks = write_gradients(dout, dlse, out, lse, bias_grad, unpack(call), separate(*grads), problem)
    return (*grads, dbias, dsinks)


def write_gradients(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    call: Call,
    dqkv: tuple[Tensor, Tensor, Tensor],
    problem: Problem | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(dbias, dsinks) of an unpacked call; the gradients of q, k and v are written into dqkv, of any strides.

    problem: the call's, where it is known.
    """
    problem = describe(call) if problem is None else problem
    if problem.empty:
        return _backward_of_nothing(call, lse, dlse, dqkv, bias_grad)
    return load(choose(problem, call.backend)).backward(problem, call, out, lse, dout, dlse, dqkv, bias_grad)


def empty_gradients(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Memory for the gradients of q, k and v in the inputs' own packing and layout."""
    _, k, v = call[:3]
    dk = None if k is None else torch.empty_like(k)
    return torch.empty_like(call.q), dk, None if v is None else torch.empty_like(v)


def empty_out(q: Tensor, problem: Problem) -> Tensor:
    """Memory for the result, its dimensions in q's own order (head_dim innermost), as PyTorch's attention has it."""
    same = problem.v_dim == problem.qk_dim
    if same and q.is_contiguous():  # most are, and it is the quicker question
        return torch.empty_like(q)
    *strides, innermost = q.stride()
    if same and innermost == 1:
        return torch.empty_like(q)
    shape = problem.out_shape
    if all(outer >= inner for outer, inner in pairwise(strides)):
        return q.new_empty(shape)
    order = sorted(range(len(strides)), key=lambda axis: strides[axis], reverse=True)
    laid_out = q.new_empty([*(shape[axis] for axis in order), shape[-1]])
    return laid_out.permute([*(order.index(axis) for axis in range(len(order))), len(order)])


def _forward_of_nothing(problem: Problem, call: Call, out: Tensor) -> tuple[Tensor, Tensor]:
    lse = call.q.new_full(problem.lse_shape, -torch.inf, dtype=problem.lse_dtype)
    if call.sinks is not None:
        lse.copy_(call.sinks[:, None].expand(problem.lse_shape))
        if call.cu_seqlens_q is not None:
            row = torch.arange(problem.total_q, device=lse.device)
            lse.masked_fill_(row >= call.cu_seqlens_q[-1], -torch.inf)  # rows of no sequence
    return out.zero_(), lse


def _backward_of_nothing(
    call: Call, lse: Tensor, dlse: Tensor | None, dqkv: tuple[Tensor, ...], bias_grad: bool
) -> tuple[Tensor | None, Tensor | None]:
    for grad in dqkv:
        grad.zero_()
    dbias = torch.zeros_like(call.bias) if bias_grad and call.bias is not None else None
    if call.sinks is None:
        return dbias, None
    delta = torch.zeros_like(lse) if dlse is None else -dlse
    return dbias, sink_gradient(call.sinks, lse, delta.masked_fill(lse == -torch.inf, 0.0))
