"""The tensors of a case: dtype, device, seed and memory layout are chosen here, the values come from the case's id."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.testing.cases import Case

LAYOUTS = ("contiguous", "bhnd", "packed", "expanded", "strided")


class Inputs(NamedTuple):
    """Shapes as `flashtile.attention` and `attention_varlen` take them; dout and dlse are shaped as out and lse."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None
    bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seed: int

    def in_float64(self) -> Inputs:
        """The same values in float64, contiguous: what the oracle computes on."""
        widened = (t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in self)
        return Inputs(*widened)  # type: ignore[arg-type]


def build(case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Inputs of a case, standard normal but for the case's own factors; equal on every device and in every process."""
    seed += zlib.crc32(case.id.encode())
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kv_heads = case.heads if case.kv_heads is None else case.kv_heads
    v_dim = case.dim if case.v_dim is None else case.v_dim
    rows, keys = _rows(case)
    q = case.amplitude * normal(*rows, case.heads, case.dim)
    k, v = normal(*keys, kv_heads, case.dim), normal(*keys, kv_heads, v_dim)
    q, k, v = arrange_inputs((q, k, v), dtype, device, case.layout)
    if case.dout_layout == "expanded":  # as the gradient of out.sum() comes: one number for all
        dout = normal(1).to(device, dtype).expand(*rows, case.heads, v_dim)
    else:
        dout = arrange(normal(*rows, case.heads, v_dim).to(device, dtype), case.dout_layout)
    lse_shape = (case.heads, *rows) if case.varlen else (rows[0], case.heads, rows[1])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bias = _bias(case, generator)
    if bias is not None:
        bias = bias.to(device, bias.dtype if bias.dtype == torch.bool else wide if case.bias_float32 else dtype)
    slopes_shape = {"heads": (case.heads,), "batch": (len(case.lengths), case.heads)}
    return Inputs(
        q=q,
        k=k,
        v=v,
        dout=dout,
        dlse=normal(*lse_shape).to(device, wide) if case.dlse else None,
        bias=bias,
        alibi_slopes=normal(*slopes_shape[case.alibi]).abs().to(device, wide) if case.alibi else None,
        sinks=normal(case.heads).to(device, dtype) if case.sinks else None,
        cu_seqlens_q=_starts(case, 0, device),
        cu_seqlens_k=_starts(case, 1, device),
        seed=seed,
    )


def arrange_inputs(
    tensors: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, device: torch.device | str, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v in a memory layout: "packed" makes them views of one tensor, "expanded" leaves q contiguous."""
    q, k, v = (t.to(device, dtype) for t in tensors)
    if layout == "packed":
        q, k, v = torch.stack([q, k, v], dim=-3).unbind(-3)
        return q, k, v
    return (q if layout == "expanded" else arrange(q, layout)), arrange(k, layout), arrange(v, layout)


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """A (..., seqlen, heads, dim) tensor in another memory layout, the values kept (but for "expanded").

    "bhnd": heads outside of rows in memory. "expanded": the first head stands for all, stride 0. "strided": every
    second element, from an odd offset, rows of odd length.
    """
    if layout == "bhnd":
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "expanded":
        return tensor[..., :1, :].expand_as(tensor)
    if layout == "strided":
        wide = tensor.new_zeros((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1))
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if layout != "contiguous":
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(map(repr, LAYOUTS))}")
    return tensor.contiguous()


def _rows(case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Leading dimensions of q and of k."""
    if not case.varlen:
        return (case.batch, case.q_len), (case.batch, case.k_len)
    q_lens, k_lens = zip(*case.lengths, strict=True)
    return (sum(q_lens) + case.trailing,), (sum(k_lens) + case.trailing,)


def _starts(case: Case, side: int, device: torch.device | str) -> Tensor | None:
    if not case.varlen:
        return None
    lengths = torch.tensor([0, *(pair[side] for pair in case.lengths)])
    return lengths.cumsum(0).to(device, torch.int32)


def _bias(case: Case, generator: torch.Generator) -> Tensor | None:
    if case.bias is None:
        return None
    longest_q, longest_k = (max(pair[side] for pair in case.lengths) for side in (0, 1))
    sizes = {"b": len(case.lengths), "h": case.heads, "q": longest_q, "k": longest_k, "1": 1}
    shape = [sizes[axis] for axis in case.bias_axes]
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.bias == "additive":
        return values
    hidden = torch.rand(shape, generator=generator) < 0.3
    if len(shape) > 1 and shape[-2] > 1:
        hidden[..., shape[-2] // 2, :] = True
    if case.bias == "boolean":
        return ~hidden
    return values.masked_fill(hidden, -torch.inf)
