"""PyTorch's own CPU flash kernel, where it computes exactly what is asked for and as fast.

That is float32, and bfloat16 calls that are over before tiles in Python have begun. It leaves the CPU's bfloat16
instructions unused, its float16 backward takes ten times as long as one in float32, and in float64 it gains nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.problem import Call, Problem

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


# Scores, over batch and heads.
_MANY = 2**17


def serves(problem: Problem) -> bool:
    """True for full or square causal attention with equal heads and head dims and nothing else.

    That kernel hides keys before it scales: a scale of 0 or below makes their scores NaN or infinite.
    """
    few = problem.batch * problem.q_heads * problem.q_len * problem.k_len < _MANY
    fast = problem.dtype == torch.float32 or (problem.dtype == torch.bfloat16 and few)
    if problem.device != "cpu" or not fast or problem.scale <= 0:
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
    out = result if out is None else out.copy_(result)
    # A row with an infinite score has no softmax, which that kernel only shows in lse.
    infinite = lse == torch.inf
    if bool(infinite.any()):
        out.masked_fill_(infinite.transpose(1, 2)[..., None], torch.nan)
        lse.masked_fill_(infinite, torch.nan)
    return out, lse.contiguous()


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
