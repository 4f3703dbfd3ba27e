"""Workload: the shapes and features of one call that `bench` times; and the tensors made for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile import masks
from flashtile.api import combine
from flashtile.problem import Problem, default_scale

Interval = tuple[int, int]


@dataclass(frozen=True)
class Workload:
    """One attention call without its tensors; dtype and device come beside it.

    window: (left, right) keys, as in `flashtile.attention`. bias: shape of an additive bias.
    lengths: packed sequences of these lengths, end to end (self-attention; batch is their number).
    padding: real key length of each batch element, the later keys are hidden. train: a backward makes sense.
    feature: what sets this workload apart from the plain one of its grid.
    """

    id: str
    batch: int
    q_len: int
    k_len: int
    heads: int
    kv_heads: int
    qk_dim: int
    v_dim: int
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float = 0.0
    alibi: bool = False
    bias: tuple[int, int, int, int] | None = None
    bias_grad: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    lengths: tuple[int, ...] | None = None
    padding: tuple[int, ...] | None = None
    train: bool = True
    feature: str = "plain"

    @property
    def group(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads

    @property
    def total(self) -> int:
        """Rows of the packed tensors."""
        return sum(self.lengths or ())

    @property
    def softmax_scale(self) -> float:
        return default_scale(self.qk_dim) if self.scale is None else self.scale

    @property
    def plain_mask(self) -> bool:
        """True where the mask is none, or causal over equal lengths: what every attention has."""
        return self.window is None and self.padding is None and (not self.causal or self.q_len == self.k_len)

    def mask(self) -> masks.Mask | None:
        """The mask without the padding."""
        return combine(None, self.causal, self.window)

    def intervals(self, batch: int) -> tuple[Tensor, Tensor]:
        """int64 (lo, hi) of each query row of one batch element, counted within its own sequence."""
        q_len, k_len = self.shape_of(batch)
        lo, hi = masks.interval_rows(masks.lower(self.mask() or masks.Full(), q_len, k_len), q_len, k_len)
        if self.padding is not None:
            lo, hi = (bound.clamp(max=self.padding[batch]) for bound in (lo, hi))
        return lo[0], hi[0]

    def shape_of(self, batch: int) -> tuple[int, int]:
        """(query length, key length) of one batch element."""
        return (self.q_len, self.k_len) if self.lengths is None else (self.lengths[batch],) * 2

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of q, k, v and out, in (batch, seqlen, heads, head_dim) or packed."""
        rows: tuple[int, ...] = (self.batch, self.q_len) if self.lengths is None else (self.total,)
        keys: tuple[int, ...] = (self.batch, self.k_len) if self.lengths is None else (self.total,)
        return {
            "q": (*rows, self.heads, self.qk_dim),
            "k": (*keys, self.kv_heads, self.qk_dim),
            "v": (*keys, self.kv_heads, self.v_dim),
            "out": (*rows, self.heads, self.v_dim),
        }

    def problem(self, dtype: torch.dtype, device: str, capability: tuple[int, int] | None) -> Problem:
        """What flashtile's dispatch sees of this workload."""
        left, right = (self.mask() or masks.Full()).distances() or (None, None)
        table = self.padding is not None
        return Problem(
            batch=self.batch,
            q_len=self.q_len,
            k_len=self.k_len,
            q_heads=self.heads,
            kv_heads=self.kv_heads,
            qk_dim=self.qk_dim,
            v_dim=self.v_dim,
            dtype=dtype,
            device=device,
            capability=capability,
            window_left=None if table else left,
            window_right=None if table else right,
            table=table,
            scale=self.softmax_scale,
            softcap=self.softcap,
            alibi=self.alibi,
            bias=None if self.bias is None else "additive",
            bias_shape=self.bias,
            sinks=self.sinks,
            dropout_p=self.dropout_p,
            varlen=self.lengths is not None,
            total_q=self.total,
            total_k=self.total,
        )


class Inputs(NamedTuple):
    """The tensors of a workload. cu_seqlens: int32, of packed sequences. seed: of dropout's generator."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    bias: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    cu_seqlens: Tensor | None
    seed: int


def make_inputs(work: Workload, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """Standard normal tensors; the same numbers for the same seed on the same kind of device."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    shapes = work.tensor_shapes()
    ends = None if work.lengths is None else torch.tensor([0, *accumulate(work.lengths)], dtype=torch.int32)
    return Inputs(
        q=normal(*shapes["q"]),
        k=normal(*shapes["k"]),
        v=normal(*shapes["v"]),
        dout=normal(*shapes["out"]),
        bias=None if work.bias is None else normal(*work.bias),
        slopes=alibi_slopes(work.heads).to(device) if work.alibi else None,
        sinks=normal(work.heads) if work.sinks else None,
        cu_seqlens=None if ends is None else ends.to(device),
        seed=seed,
    )


def alibi_slopes(heads: int) -> Tensor:
    """2^(-8/h), 2^(-16/h), ... (Press et al. 2022, section 3), float32 (heads,)."""
    return torch.tensor([math.exp2(-8 * (index + 1) / heads) for index in range(heads)])
