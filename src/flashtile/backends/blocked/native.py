"""PyTorch's own CPU flash kernel, where it computes exactly what is asked for: in float32 it is as fast as tiles are.

Half precision is not given to it: its products leave the CPU's bfloat16 instructions unused, and its float16 backward
takes ten times as long as one in float32. In float64 it is no faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.problem import Call, Problem

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def serves(problem: Problem) -> bool:
    """True for full or square causal attention with equal heads and head dims and nothing else.

    A scale of 0 makes that kernel's causal scores NaN: it hides keys before it scales.
    """
    if problem.device != "cpu" or problem.dtype != torch.float32 or problem.scale == 0:
        return False
    masked = problem.table or problem.window_left is not None or problem.window_right not in (None, 0)
    rectangular_causal = problem.window_right == 0 and problem.q_len != problem.k_len
    changed = problem.softcap > 0 or problem.alibi or problem.bias is not None or problem.sinks
    shaped = problem.group > 1 or problem.qk_dim != problem.v_dim or problem.varlen
    return not (masked or rectangular_causal or changed or shaped or problem.dropout_p > 0)


def forward(problem: Problem, call: Call, out: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = _heads_first(call.q, call.k, call.v)
    result, lse = _forward(q, k, v, 0.0, problem.window_right == 0, scale=problem.scale)
    result = result.transpose(1, 2)
    return (result if out is None else out.copy_(result)), lse.contiguous()


def backward(
    problem: Problem, call: Call, out: Tensor, lse: Tensor, dout: Tensor, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    q, k, v, out, dout = _heads_first(call.q, call.k, call.v, out, dout)
    causal = problem.window_right == 0
    results = _backward(dout, q, k, v, out, lse, 0.0, causal, scale=problem.scale)
    for grad, result in zip(grads, results, strict=True):
        grad.copy_(result.transpose(1, 2))


def _heads_first(*tensors: Tensor | None) -> list[Tensor]:
    """(batch, heads, rows, dim) of each; that kernel takes the head dim to be contiguous without looking."""
    heads_first = [t.transpose(1, 2) for t in tensors if t is not None]
    return [t if t.stride(-1) == 1 else t.contiguous() for t in heads_first]
