"""What every kernel is told about a problem, whichever backend launches it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from flashtile import dropout
from flashtile.gpu import mailbox
from flashtile.problem import Call, Problem

_UNLIMITED = 2**30

# Integers that change from call to call: a kernel specialised on their values would be compiled again and again.
RUNTIME = [
    "batch", "heads", "group", "max_q", "max_k", "total_q", "total_k", "tiles", "programs", "section",
    "left", "right", "threshold", "stride_tb", "stride_sb", "repeat_b", "repeat_h",
]  # fmt: skip

# What the L2 cache should hold of the keys and values in use; half of an H100's 50 MB, which leaves room for the rest.
_L2_BYTES = 25 * 2**20


EXTRAS = 9  # tensors that every kernel takes beside its own


def extras(call: Call) -> tuple[Tensor, ...]:
    """bias, slopes, sinks, cu_q, cu_k, lo, hi, rng, mailbox; q stands in for the absent ones, which nobody reads."""
    return (*[call.q if tensor is None else tensor for tensor in (*call[3:11], mailbox_of(call))],)


def mailbox_of(call: Call) -> Tensor | None:
    return None if call.cu_seqlens_q is None else mailbox.of(call.q.device)


def scalars(problem: Problem, call: Call) -> dict[str, Any]:
    """The numbers that every kernel takes."""
    slopes = call.alibi_slopes
    table = call.lo
    return {
        "stride_sb": slopes.stride(0) if slopes is not None and slopes.ndim == 2 else 0,
        "stride_tb": table.stride(0) if table is not None and table.shape[0] > 1 else 0,
        "batch": problem.batch,
        "heads": problem.q_heads,
        "group": problem.group,
        "max_q": problem.q_len,
        "max_k": problem.k_len,
        "total_q": problem.total_q,
        "total_k": problem.total_k,
        "padded": _padded_rows(problem),
        "scratch": scratch_rows(problem),
        "left": _distance(problem.window_left),
        "right": _distance(problem.window_right),
        "scale": float(problem.scale),
        "softcap": float(problem.softcap),
        # At dropout_p = 1 keep_scale is 0 and what is kept does not matter.
        "threshold": min(dropout.threshold(problem.dropout_p), 65535),
        "keep_scale": 1.0 / (1.0 - problem.dropout_p) if problem.dropout_p < 1.0 else 0.0,
    }


def _padded_rows(problem: Problem) -> int:
    """Rows of one head (varlen: of all sequences) in the backward's scratch, a multiple of 128 for each sequence."""
    rows = problem.total_q + 128 * problem.batch if problem.varlen else problem.q_len
    return -(-rows // 128) * 128


def padded_keys(problem: Problem) -> int:
    """Keys of one head there, the same way."""
    keys = problem.total_k + 128 * problem.batch if problem.varlen else problem.k_len
    return -(-keys // 128) * 128


def scratch_rows(problem: Problem) -> int:
    """Rows in the backward's scratch."""
    return _padded_rows(problem) * problem.q_heads * (1 if problem.varlen else problem.batch)


def scratch_keys(problem: Problem) -> int:
    """Keys there of all key-value heads."""
    return padded_keys(problem) * problem.kv_heads * (1 if problem.varlen else problem.batch)


def _distance(side: int | None) -> int:
    return _UNLIMITED if side is None else max(-_UNLIMITED, min(side, _UNLIMITED))


def mask_kind(problem: Problem) -> str:
    if problem.table:
        return "table"
    return "none" if problem.window_left is None and problem.window_right is None else "band"


def changes_scores(problem: Problem) -> bool:
    """True where a score is more than scale * q.k."""
    return problem.softcap > 0 or problem.alibi or problem.bias is not None


def softcap_kind(problem: Problem) -> str:
    """How tanh is made: NVIDIA's instruction is as good as the 16-bit scores of plain PyTorch, not as float32's."""
    if problem.softcap == 0:
        return "none"
    return "fast" if problem.capability is not None and problem.dtype.itemsize == 2 else "exact"


def section(problem: Problem, length: int, group: int, room: int = _L2_BYTES) -> int:
    """Query heads whose keys and values fit the L2 cache together; a multiple of those that share a key-value head."""
    per_head = max(1, length * (problem.qk_dim + problem.v_dim) * problem.dtype.itemsize)
    return max(1, room // per_head) * group


def bias_strides(problem: Problem, biases: dict[str, Tensor | None]) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """Strides of a bias and its like over (batch, heads, q_len, k_len) by name, and as plain tuples; 0 where broadcast.

    BIAS_ALIGN is the number of elements in 16 bytes where all strides but the innermost are multiples of it, and so is
    k_len; they are passed divided by it and multiplied again in the kernel, which tells the compiler that wide loads
    are right.
    """
    steps = {name: _bias_steps(bias) for name, bias in biases.items()}
    bias = biases["b"]
    dtype = torch.bool if bias is None else bias.dtype
    align = alignment(dtype, steps.values(), problem.k_len)
    if problem.varlen or any(other is not None and other.dtype != dtype for other in biases.values()):
        align = 1
    values: dict[str, Any] = {"BIAS_ALIGN": align}
    for name, (b, h, m, n) in steps.items():
        parts = (b // align, h // align, m // align, n)
        values |= {f"stride_{name}{axis}": part for axis, part in zip("bhmn", parts, strict=True)}
    return values, list(steps.values())


def _bias_steps(bias: Tensor | None) -> tuple[int, ...]:
    """Strides over (batch, heads, q_len, k_len), 0 where bias is broadcast or absent."""
    steps = [0, 0, 0, 0]
    if bias is not None:
        for axis in range(1, bias.ndim + 1):
            steps[-axis] = 0 if bias.shape[-axis] == 1 else bias.stride(-axis)
    return tuple(steps)


def alignment(dtype: torch.dtype, steps: Iterable[tuple[int, ...]], length: int) -> int:
    """Elements in 16 bytes where every stride but the last, and length, is a multiple of that; else 1."""
    elements = 16 // dtype.itemsize
    multiples = all(step % elements == 0 for step_of in steps for step in step_of[:-1])
    return elements if multiples and (length == 1 or length % elements == 0) else 1


def with_dense_bias(call: Call) -> Call:
    """The call with a bias whose last dimension is contiguous or broadcast."""
    bias = call.bias
    if bias is None or bias.shape[-1] == 1 or bias.stride(-1) == 1:
        return call
    return call._replace(bias=bias.contiguous())


def features(problem: Problem) -> dict[str, Any]:
    """The compile-time arguments that say what a call is made of."""
    return {
        "VARLEN": problem.varlen,
        "KIND": mask_kind(problem),
        "LEFT": problem.table or problem.window_left is not None,
        "SOFTCAP": softcap_kind(problem),
        "ALIBI": problem.alibi,
        "BIAS": problem.bias or "none",
        "DROPOUT": problem.dropout_p > 0,
    }


def in_order(call: Call) -> Call:
    """The call with slopes, sinks and cu_seqlens as kernels read them: one number behind the other in memory."""
    for tensor in (call.alibi_slopes, call.sinks, call.cu_seqlens_q, call.cu_seqlens_k):
        if tensor is not None and not tensor.is_contiguous():
            break
    else:
        return call
    names = ("alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k")
    tensors = {name: getattr(call, name) for name in names}
    return call._replace(**{name: t.contiguous() for name, t in tensors.items() if t is not None})
