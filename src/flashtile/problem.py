"""One attention call: `Call` carries its tensors and numbers, `Problem` describes it without any tensor.

`validation.describe(call)` checks a call and makes its Problem: frozen, hashable, printed in one line; dispatch,
configurations, launch caches, test ids and error texts all use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Call(NamedTuple):
    """The arguments of one attention call, in the order of the op schema.

    q: (batch, q_len, heads, qk_dim), or (total_q, heads, qk_dim) with cu_seqlens_q.
    k, v: (batch, k_len, kv_heads, qk_dim | v_dim), or (total_k, kv_heads, ...) with cu_seqlens_k.
    Packed forms: v is None means that k is (..., 2, kv_heads, dim) with k and v in it; both None, that q is
    (..., 3, heads, dim) with all three. `unpack` turns them into views.
    bias: broadcastable to (batch, heads, q_len, k_len); boolean (True is seen) or added to the scaled scores.
    lo, hi: int32 (1 or batch, q_len), see masks.Lowered. rng: int64[2] (seed, offset) where dropout_p > 0.
    """

    q: Tensor
    k: Any  # Tensor, or None in a packed form; typed loosely because every backend reads the unpacked call
    v: Any
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    lo: Tensor | None = None
    hi: Tensor | None = None
    rng: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    window_left: int | None = None
    window_right: int | None = None
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0
    deterministic: bool = False
    backend: str | None = None


@dataclass(frozen=True)
class Problem:
    """What there is to compute. Lengths are those of the longest sequence where sequences are packed (varlen).

    window_left, window_right: keys seen before and after a row's own position, None unlimited. table: the mask is a
    per-row table instead. bias: None, "additive" or "boolean"; bias_shape as given, 1 where it is broadcast.
    capability: (major, minor) of an NVIDIA device, None elsewhere (also on AMD's, whose device is "cuda" too).
    """

    batch: int
    q_len: int
    k_len: int
    q_heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    dtype: torch.dtype
    device: str
    capability: tuple[int, int] | None = None
    window_left: int | None = None
    window_right: int | None = None
    table: bool = False
    scale: float = 1.0
    softcap: float = 0.0
    alibi: bool = False
    bias: str | None = None
    bias_shape: tuple[int, int, int, int] | None = None
    sinks: bool = False
    dropout_p: float = 0.0
    varlen: bool = False
    total_q: int = 0
    total_k: int = 0
    deterministic: bool = False

    def __hash__(self) -> int:
        # A Problem is a dictionary key on every call: hash it once. And not before it is one: while a compiler traces
        # dynamic shapes, lengths are symbols, which have no hash.
        try:
            return self._hash  # type: ignore[attr-defined]
        except AttributeError:
            values = tuple(getattr(self, name) for name in self.__dataclass_fields__)
            object.__setattr__(self, "_hash", hash(values))
            return self._hash  # type: ignore[attr-defined]

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.q_heads // self.kv_heads

    @cached_property
    def bare(self) -> bool:
        """True where a call has no tensors beside q, k and v."""
        extras = (self.alibi, self.bias, self.sinks, self.varlen, self.table, self.dropout_p)
        return not any(extras)

    @cached_property
    def empty(self) -> bool:
        """True where there is no output element or no key at all."""
        queries, keys = (self.total_q, self.total_k) if self.varlen else (self.q_len, self.k_len)
        return self.batch * queries * self.q_heads * keys == 0

    @cached_property
    def out_shape(self) -> tuple[int, ...]:
        rows = (self.total_q,) if self.varlen else (self.batch, self.q_len)
        return (*rows, self.q_heads, self.v_dim)

    @cached_property
    def lse_shape(self) -> tuple[int, ...]:
        if self.varlen:
            return (self.q_heads, self.total_q)
        return (self.batch, self.q_heads, self.q_len)

    @cached_property
    def lse_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def __str__(self) -> str:
        dims = f"d{self.qk_dim}" if self.qk_dim == self.v_dim else f"d{self.qk_dim}/{self.v_dim}"
        heads = f"h{self.q_heads}" if self.group == 1 else f"h{self.q_heads}/{self.kv_heads}"
        window = "table" if self.table else _window_text(self.window_left, self.window_right)
        extras = [
            name
            for name, on in (
                ("varlen", self.varlen),
                (window, window != "full"),
                (f"softcap{self.softcap:g}", self.softcap > 0),
                ("alibi", self.alibi),
                (f"bias:{self.bias}", self.bias is not None),
                ("sinks", self.sinks),
                (f"dropout{self.dropout_p:g}", self.dropout_p > 0),
                ("deterministic", self.deterministic),
            )
            if on
        ]
        dtype = str(self.dtype).removeprefix("torch.")
        return " ".join([f"b{self.batch} q{self.q_len} k{self.k_len} {heads} {dims} {dtype} {self.device}", *extras])


def _window_text(left: int | None, right: int | None) -> str:
    if left is None and right is None:
        return "full"
    if left is None and right == 0:
        return "causal"
    return f"window({left},{right})"


def unpack(call: Call) -> Call:
    """The call with q, k and v as separate views of packed inputs."""
    if call.v is not None:
        return call
    q, k, v = separate(*call[:3])
    return call._replace(q=q, k=k, v=v)


def separate(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, or their gradients, as separate views of packed ones."""
    if k is None:
        q, k, v = q.unbind(-3)
    elif v is None:
        k, v = k.unbind(-3)
    return q, k, v


def default_scale(qk_dim: int) -> float:
    """1 / sqrt(qk_dim), the scale of "Attention is all you need", section 3.2.1."""
    return 1.0 / math.sqrt(qk_dim) if qk_dim > 0 else 1.0
