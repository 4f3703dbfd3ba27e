"""The one table of checks for a call: every message names the argument, what it got and what was expected."""

from __future__ import annotations

import math
from itertools import pairwise
from numbers import Real
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from flashtile.problem import DTYPES, MAX_HEAD_DIM, Call, Problem


def fail(argument: str, got: object, expected: str, error: type[Exception] = ValueError) -> NoReturn:
    raise error(f"{argument}: got {got}, expected {expected}")


_DESCRIBED: dict[tuple[object, ...], Problem] = {}
_DESCRIBED_LIMIT = 4096
_OVERLAP_WORK = 100_000  # candidates that NumPy may try, well under a millisecond
_OPTIONAL = ("bias", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k")


def describe(call: Call) -> Problem:
    """Checks an unpacked call and describes it; calls alike in everything but data share one Problem.

    Raises TypeError or ValueError that names the argument, what it got and what was expected.
    """
    key = _metadata(call)
    problem = _DESCRIBED.get(key)
    if problem is None:
        problem = check(call)
        if len(_DESCRIBED) >= _DESCRIBED_LIMIT:
            _DESCRIBED.clear()
        _DESCRIBED[key] = problem
    return problem


def _metadata(call: Call) -> tuple[object, ...]:
    q, k, v = call.q, call.k, call.v
    return (  # flat where every call has something
        *(q.shape, q.dtype, q.device, k.shape, k.dtype, k.device, v.shape, v.dtype, v.device),
        *[t if t is None else (t.shape, t.dtype, t.device) for t in call[3:11]],
        *call[11:],
    )


def check(call: Call) -> Problem:
    """Checks an unpacked call and describes it."""
    check_layout(call)
    _check_tensors(call)
    varlen = call.cu_seqlens_q is not None
    batch, q_len, k_len = _lengths(call, varlen)
    _check_heads(call)
    _check_numbers(call)
    q, k, v = call.q, call.k, call.v
    heads = q.shape[-2]
    bias_shape = _check_bias(call, (batch, heads, q_len, k_len))
    _check_per_head(call, batch, heads)
    _check_table(call, batch, q_len)
    return Problem(
        batch=batch,
        q_len=q_len,
        k_len=k_len,
        q_heads=heads,
        kv_heads=k.shape[-2],
        qk_dim=q.shape[-1],
        v_dim=v.shape[-1],
        dtype=q.dtype,
        device=q.device.type,
        capability=_capability(q.device),
        window_left=call.window_left,
        window_right=call.window_right,
        table=call.lo is not None,
        scale=call.scale,
        softcap=call.softcap,
        alibi=call.alibi_slopes is not None,
        bias=None if call.bias is None else "boolean" if call.bias.dtype == torch.bool else "additive",
        bias_shape=bias_shape,
        sinks=call.sinks is not None,
        dropout_p=call.dropout_p,
        varlen=varlen,
        total_q=q.shape[0] if varlen else 0,
        total_k=k.shape[0] if varlen else 0,
        deterministic=call.deterministic,
    )


def _capability(device: torch.device) -> tuple[int, int] | None:
    """(major, minor) of an NVIDIA device; AMD's, which PyTorch also calls "cuda", have none."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def check_is_tensor(argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        fail(argument, type(value).__name__, "a torch.Tensor", TypeError)
    if value.layout is not torch.strided:
        fail(argument, f"layout {value.layout}", "torch.strided", TypeError)


def _check_tensors(call: Call) -> None:
    names = ("q", "k", "v", *_OPTIONAL, "lo", "hi", "rng")
    for name, value in zip(names, call, strict=False):
        if value is not None and value.device != call.q.device:
            fail(name, f"device {value.device}", f"{call.q.device}, the device of q")
    if call.q.dtype not in DTYPES:
        fail("q", call.q.dtype, "float16, bfloat16, float32 or float64", TypeError)
    for name, value in (("k", call.k), ("v", call.v)):
        if value.dtype != call.q.dtype:
            fail(name, value.dtype, f"{call.q.dtype}, the dtype of q", TypeError)


def check_layout(call: Call) -> None:
    """q, k and v are tensors of the right rank; packed forms (problem.Call) hold three or two along dimension -3."""
    q, k, v = call[:3]
    rank, rows = (4, "batch, seqlen") if call.cu_seqlens_q is None else (3, "total")
    if _plain(q, rank) and _plain(k, rank) and _plain(v, rank):
        return
    for name, value, parts in (
        ("q", q, 3 if k is None else 1),
        ("k", k, 1 if v is not None else 2 if k is not None else 0),
        ("v", v, 1 if v is not None else 0),
    ):
        if parts == 0:
            continue
        check_is_tensor(name, value)
        packed = parts > 1
        if value.ndim != rank + packed or (packed and value.shape[-3] != parts):
            layout = f"({rows}, {f'{parts}, ' if packed else ''}heads, head_dim)"
            fail(name, f"{value.ndim} dimensions {tuple(value.shape)}", f"{rank + packed}: {layout}")


def _plain(tensor: Any, rank: int) -> bool:
    """What most are; `check_layout` takes its time over the others."""
    return type(tensor) is Tensor and tensor.layout is torch.strided and tensor.ndim == rank


def _lengths(call: Call, varlen: bool) -> tuple[int, int, int]:
    """(batch, longest query, longest key) of the call."""
    q, k, v = call.q, call.k, call.v
    if v.shape[:-1] != k.shape[:-1]:
        fail("v", f"shape {tuple(v.shape)}", f"{tuple(k.shape[:-1])} before the head dim, as k")
    if not varlen:
        if k.shape[0] != q.shape[0]:
            fail("k", f"batch {k.shape[0]}", f"{q.shape[0]}, the batch of q")
        return q.shape[0], q.shape[1], k.shape[1]
    return varlen_lengths(call)


def varlen_lengths(call: Call) -> tuple[int, int, int]:
    """(batch, max_seqlen_q, max_seqlen_k) of a call with packed sequences, from shapes and numbers only."""
    batch, k_batch = (_sequences(name, getattr(call, name)) for name in ("cu_seqlens_q", "cu_seqlens_k"))
    if k_batch != batch:
        fail("cu_seqlens_k", f"length {k_batch + 1}", f"{batch + 1}, the length of cu_seqlens_q")
    q_len, k_len = (_longest(name, getattr(call, name)) for name in ("max_seqlen_q", "max_seqlen_k"))
    return batch, q_len, k_len


def _sequences(name: str, cu: Tensor) -> int:
    check_is_tensor(name, cu)
    if cu.dtype != torch.int32:
        fail(name, cu.dtype, "torch.int32", TypeError)
    if cu.ndim != 1 or cu.shape[0] < 1:
        fail(name, f"shape {tuple(cu.shape)}", "(batch + 1,)")
    return cu.shape[0] - 1


def _longest(name: str, longest: int | None) -> int:
    if isinstance(longest, bool) or not isinstance(longest, (int, torch.SymInt)):
        fail(name, type(longest).__name__, "an int", TypeError)
    if longest < 0:
        fail(name, longest, "an int >= 0")
    return longest


def check_cu_seqlens_values(name: str, cu: Tensor, total: int, longest: int) -> None:
    """The contents of cu_seqlens on the host: starts at 0, never decreases, ends within total, fits max_seqlen.

    Called for CPU tensors; on a GPU the kernels check the same while they run, without a host synchronisation.
    """
    values = cu.tolist()
    if values[0] != 0:
        fail(name, f"first value {values[0]}", "0")
    for index, (start, end) in enumerate(pairwise(values)):
        if end < start:
            fail(name, f"{start} then {end} at index {index + 1}", "non-decreasing values")
        if end - start > longest:
            fail(name, f"a sequence of {end - start}", f"at most {longest}, max_seqlen_{name[-1]}")
    if values[-1] > total:
        fail(name, f"last value {values[-1]}", f"at most {total}, the length of {name[-1]}")


def _check_heads(call: Call) -> None:
    q, k, v = call.q, call.k, call.v
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if (heads % kv_heads if kv_heads else heads) != 0:
        fail("k", f"{kv_heads} heads", f"a divisor of {heads}, the heads of q")
    if k.shape[-1] != q.shape[-1]:
        fail("k", f"head_dim {k.shape[-1]}", f"{q.shape[-1]}, the head_dim of q")
    for name, dim in (("q", q.shape[-1]), ("v", v.shape[-1])):
        if not 1 <= dim <= MAX_HEAD_DIM:
            fail(name, f"head_dim {dim}", f"1 to {MAX_HEAD_DIM}")


def check_types(call: Call, scale: float, deterministic: bool) -> tuple[float, float, float]:
    """(scale, softcap, dropout_p) as floats, all other types checked.

    Here and not in `check`, whose answers are kept for equal calls: to Python, 1, 1.0 and True are equal.
    """
    _, _, _, bias, slopes, sinks, cu_seqlens_q, cu_seqlens_k = call[:8]
    if bias is not None:
        check_is_tensor("bias", bias)
    if slopes is not None:
        check_is_tensor("alibi_slopes", slopes)
        if slopes.requires_grad:
            fail("alibi_slopes", "a tensor that requires grad", "one that does not; give learned slopes as a bias")
    if sinks is not None:
        check_is_tensor("sinks", sinks)
    if cu_seqlens_q is not None:
        check_is_tensor("cu_seqlens_q", cu_seqlens_q)
    if cu_seqlens_k is not None:
        check_is_tensor("cu_seqlens_k", cu_seqlens_k)
    if not isinstance(deterministic, bool):
        fail("deterministic", type(deterministic).__name__, "a bool or None", TypeError)
    if cu_seqlens_q is not None:
        varlen_lengths(call)
    return _number("scale", scale), _number("softcap", call.softcap), _number("dropout_p", call.dropout_p)


def _number(name: str, value: Any) -> float:
    if not isinstance(value, (float, torch.SymFloat)):
        if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt)):
            fail(name, type(value).__name__, "a number", TypeError)
        value = float(value)
    return value


def _check_numbers(call: Call) -> None:
    for name, value in (("scale", call.scale), ("softcap", call.softcap), ("dropout_p", call.dropout_p)):
        if not isinstance(value, torch.SymFloat) and not math.isfinite(value):
            fail(name, value, "a finite number")
    if call.softcap < 0:
        fail("softcap", call.softcap, "0 (off) or a positive number")
    if not 0 <= call.dropout_p <= 1:
        fail("dropout_p", call.dropout_p, "a probability from 0 to 1")


def _check_bias(call: Call, full: tuple[int, int, int, int]) -> tuple[int, int, int, int] | None:
    bias = call.bias
    if bias is None:
        return None
    if bias.dtype not in (torch.bool, torch.float32, call.q.dtype):
        fail("bias", bias.dtype, f"bool, float32 or {call.q.dtype}, the dtype of q", TypeError)
    if bias.ndim > 4 or any(have not in (1, want) for have, want in zip(bias.shape[::-1], full[::-1], strict=False)):
        fail("bias", f"shape {tuple(bias.shape)}", f"broadcastable to (batch, heads, q_len, k_len) = {full}")
    padded = (1,) * (4 - bias.ndim) + tuple(bias.shape)
    return padded  # type: ignore[return-value]


def _check_per_head(call: Call, batch: int, heads: int) -> None:
    slopes, sinks = call.alibi_slopes, call.sinks
    if slopes is not None:
        if not slopes.is_floating_point():
            fail("alibi_slopes", slopes.dtype, "a floating-point dtype", TypeError)
        if tuple(slopes.shape) not in ((heads,), (batch, heads)):
            fail("alibi_slopes", f"shape {tuple(slopes.shape)}", f"({heads},) or ({batch}, {heads})")
    if sinks is not None:
        if not sinks.is_floating_point():
            fail("sinks", sinks.dtype, "a floating-point dtype", TypeError)
        if tuple(sinks.shape) != (heads,):
            fail("sinks", f"shape {tuple(sinks.shape)}", f"({heads},), one logit per query head")


def _check_table(call: Call, batch: int, q_len: int) -> None:
    for name, table in (("lo", call.lo), ("hi", call.hi)):
        if table is not None and (table.ndim != 2 or table.shape[0] not in (1, batch) or table.shape[1] != q_len):
            fail(f"mask {name}", f"shape {tuple(table.shape)}", f"(1 or {batch}, {q_len})")


def check_out(out: Tensor, call: Call, shape: tuple[int, ...]) -> None:
    """`out` must be writable memory of the result's own: its shape, dtype and device, shared with no input."""
    check_is_tensor("out", out)
    if tuple(out.shape) != tuple(shape):
        fail("out", f"shape {tuple(out.shape)}", f"{tuple(shape)}")
    if out.dtype != call.q.dtype:
        fail("out", out.dtype, f"{call.q.dtype}, the dtype of q", TypeError)
    if out.device != call.q.device:
        fail("out", f"device {out.device}", f"{call.q.device}, the device of q")
    inputs = [t for t in call[:6] if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, out)):
        fail("out", "out= with inputs that require grad", "no gradient; leave out= away or use torch.no_grad()")
    if torch.compiler.is_compiling() or type(out) is not Tensor or out.is_meta or out.numel() == 0:
        return  # there is no memory to look at
    if not _is_nested(out):
        fail("out", f"strides {out.stride()} for shape {tuple(out.shape)}", "no elements that share memory")
    for name, tensor in zip(Call._fields, call[:6], strict=False):
        if tensor is not None and tensor.numel() > 0 and _share_memory(out, tensor):
            fail("out", f"memory that overlaps {name}", "memory of its own")


def _is_nested(tensor: Tensor) -> bool:
    """Whether each stride passes over all that the smaller strides reach, so that no two elements share memory."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have a byte in common; interleaved views of one buffer need not.

    NumPy answers the question exactly from addresses and strides alone, on any device. Where that takes too long, the
    first and last bytes decide.
    """
    first, second = _Bytes(a), _Bytes(b)
    try:
        return np.shares_memory(first, second, max_work=_OVERLAP_WORK)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return np.may_share_memory(first, second)


class _Bytes:
    """Lets NumPy see where a tensor lies; the memory itself is not touched."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "data": (tensor.data_ptr(), True),
            "typestr": f"|V{size}",
            "shape": tuple(tensor.shape),
            "strides": tuple(size * stride for stride in tensor.stride()),
        }
