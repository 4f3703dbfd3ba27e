"""The attention implementations that `bench` compares: what a peer is, flashtile itself, and standard attention.

A peer says in one sentence why it cannot do a call, or prepares it: tensors in the memory layout it likes best, masks
and compiled functions made, so that the prepared call is what its user would run in a loop.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

import flashtile
from flashtile.cli import machine
from flashtile.cli.costs import score_bytes
from flashtile.cli.workload import Inputs, Workload
from flashtile.dispatch import choose

GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """How a workload is run: device type, dtype, and whether gradients are wanted."""

    device: str
    dtype: torch.dtype
    backward: bool


@dataclass
class Prepared:
    """A call ready to be repeated.

    leaves: the tensors that have gradients, under the names of Inputs. dout has the layout of the call's result.
    heads_first: that layout is (batch, heads, seqlen, head_dim). held_bytes: masks and biases beyond the inputs that
    the peer needs. context: entered around the calls.
    """

    call: Callable[[], Tensor]
    leaves: dict[str, Tensor]
    dout: Tensor
    heads_first: bool = False
    held_bytes: int = 0
    context: Callable[[], AbstractContextManager[object]] = field(default=nullcontext)

    def train(self) -> tuple[Tensor, ...]:
        """(out, gradient of each leaf)."""
        out = self.call()
        return (out, *torch.autograd.grad(out, list(self.leaves.values()), self.dout))

    def results(self, backward: bool, work: Workload) -> dict[str, Tensor]:
        """out and, if asked, the gradients as "dq", "dk", ..., in flashtile's layout."""
        with self.context():
            if not backward:
                with torch.no_grad():
                    return {"out": self._native(self.call().detach(), work)}
            out, *grads = self.train()
        results = {"out": self._native(out.detach(), work)}
        for name, grad in zip(self.leaves, grads, strict=True):
            results[f"d{name}"] = self._native(grad, work) if name in ("q", "k", "v") else grad
        return results

    def _native(self, tensor: Tensor, work: Workload) -> Tensor:
        """In (batch, seqlen, heads, head_dim), or (total, heads, head_dim) for packed sequences."""
        tensor = tensor.transpose(1, 2) if self.heads_first else tensor
        return tensor[0] if work.lengths is not None and tensor.ndim == 4 else tensor


class Peer(Protocol):
    """One implementation under its name in tables and rows. drops_alike: dropout falls where flashtile's falls."""

    @property
    def name(self) -> str: ...

    @property
    def drops_alike(self) -> bool: ...

    def refuses(self, work: Workload, setting: Setting) -> str | None:
        """None, or the sentence why it cannot do this call; everything known before trying."""
        ...

    def prepare(self, work: Workload, inputs: Inputs, backward: bool) -> Prepared:
        """The call, ready, with gradients if `backward`; may raise what the implementation raises."""
        ...


def leaves_of(work: Workload, inputs: Inputs, backward: bool, heads_first: bool) -> dict[str, Tensor]:
    """Fresh copies of q, k, v, and of a learned bias and sinks, in a layout; they require grad if `backward`."""
    found: dict[str, Tensor] = {}
    for name in ("q", "k", "v"):
        tensor: Tensor = getattr(inputs, name)
        found[name] = as_heads_first(work, tensor) if heads_first else tensor.clone()
    if inputs.bias is not None and work.bias_grad:
        found["bias"] = inputs.bias.clone()
    if inputs.sinks is not None:
        found["sinks"] = inputs.sinks.clone()
    return {name: tensor.requires_grad_(backward) for name, tensor in found.items()}


def as_heads_first(work: Workload, tensor: Tensor) -> Tensor:
    """A contiguous (batch, heads, seqlen, head_dim) copy; packed sequences become a batch of one."""
    tensor = tensor[None] if work.lengths is not None else tensor
    return tensor.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def visible(work: Workload, device: str | torch.device) -> Tensor | None:
    """The mask as booleans, (1 or batch, 1, q_len, k_len), of packed sequences (1, 1, total, total); None if full."""
    if work.lengths is not None:
        parts = [_visible_part(work, batch) for batch in range(len(work.lengths))]
        return torch.block_diag(*(part.to(device, torch.uint8) for part in parts)).bool()[None, None]
    if work.mask() is None and work.padding is None:
        return None
    batches = range(work.batch) if work.padding is not None else (0,)
    return torch.stack([_visible_part(work, batch) for batch in batches])[:, None].to(device)


def _visible_part(work: Workload, batch: int) -> Tensor:
    lo, hi = work.intervals(batch)
    key = torch.arange(work.shape_of(batch)[1])
    return (key >= lo[:, None]) & (key < hi[:, None])


def alibi_bias(work: Workload, inputs: Inputs) -> Tensor:
    """ALiBi as an additive bias, (1, heads, q_len, k_len), in the inputs' dtype."""
    assert inputs.slopes is not None
    q_len, k_len = (work.total, work.total) if work.lengths is not None else (work.q_len, work.k_len)
    row = torch.arange(q_len, device=inputs.q.device)[:, None] + (k_len - q_len)
    distance = (row - torch.arange(k_len, device=inputs.q.device)).abs()
    return (-inputs.slopes[:, None, None] * distance).to(inputs.q.dtype)[None]


def too_large(work: Workload, setting: Setting, matrices: float) -> str | None:
    """The reason to leave out an implementation that holds so many score matrices at once."""
    free = machine.free_memory(setting.device)
    needed = matrices * score_bytes(work, setting.dtype)
    if free is None or needed <= 0.8 * free:
        return None
    return f"needs about {needed / GIB:.0f} GiB for its score matrices, {free / GIB:.0f} GiB are free"


class Flashtile:
    """This package, with the backend that its dispatch chooses or one that is asked for; or another version of it."""

    drops_alike = True

    def __init__(self, backend: str | None = None, package: Any = flashtile, name: str = "flashtile") -> None:
        self.backend = backend
        self.name = name if backend is None else f"{name}:{backend}"
        self._package = package

    def refuses(self, work: Workload, setting: Setting) -> str | None:
        problem = work.problem(setting.dtype, setting.device, machine.capability(setting.device))
        try:
            choose(problem, self.backend)
        except NotImplementedError as error:
            return str(error)
        return None

    def prepare(self, work: Workload, inputs: Inputs, backward: bool) -> Prepared:
        leaves = leaves_of(work, inputs, backward, heads_first=False)
        mask = None
        if work.padding is not None:
            ends = torch.tensor(work.padding, device=inputs.q.device)[:, None].expand(-1, work.q_len).contiguous()
            mask = self._package.masks.Intervals(torch.zeros_like(ends), ends)
        bias = leaves.get("bias", inputs.bias)
        sinks = leaves.get("sinks")

        def call() -> Tensor:
            keywords = {
                "mask": mask,
                "causal": work.causal,
                "window": work.window,
                "scale": work.scale,
                "softcap": work.softcap,
                "alibi_slopes": inputs.slopes,
                "bias": bias,
                "sinks": sinks,
                "dropout_p": work.dropout_p,
                "backend": self.backend,
            }
            q, k, v = leaves["q"], leaves["k"], leaves["v"]
            if inputs.cu_seqlens is None:
                return self._package.attention(q, k, v, **keywords)
            packed = (inputs.cu_seqlens, inputs.cu_seqlens, work.q_len, work.k_len)
            return self._package.attention_varlen(q, k, v, *packed, **keywords)

        return Prepared(call, leaves, inputs.dout)


class Standard:
    """Standard attention as a few PyTorch operations, the whole score matrix in memory."""

    name = "standard"
    drops_alike = False

    def refuses(self, work: Workload, setting: Setting) -> str | None:
        return too_large(work, setting, 7 if setting.backward else 4)

    def prepare(self, work: Workload, inputs: Inputs, backward: bool) -> Prepared:
        leaves = leaves_of(work, inputs, backward, heads_first=True)
        seen = visible(work, inputs.q.device)
        hidden = None if seen is None else ~seen
        alibi = None if inputs.slopes is None else alibi_bias(work, inputs)
        bias = leaves.get("bias", inputs.bias)

        def call() -> Tensor:
            q, k, v = leaves["q"], leaves["k"], leaves["v"]
            if work.group > 1:
                k, v = (t.repeat_interleave(work.group, 1) for t in (k, v))
            scores = (q @ k.transpose(-1, -2)) * work.softmax_scale
            if work.softcap > 0:
                scores = work.softcap * torch.tanh(scores / work.softcap)
            for added in (alibi, bias):
                scores = scores if added is None else scores + added
            if hidden is not None:
                scores = scores.masked_fill(hidden, -torch.inf)
            if "sinks" in leaves:
                column = leaves["sinks"][:, None, None].expand(q.shape[0], -1, q.shape[2], 1)
                weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
            else:
                weights = torch.softmax(scores, -1)
            if work.dropout_p > 0:
                weights = torch.dropout(weights, work.dropout_p, True)
            return weights @ v

        held = sum(t.nbytes for t in (hidden, alibi) if t is not None)
        return Prepared(call, leaves, as_heads_first(work, inputs.dout), heads_first=True, held_bytes=held)
