"""The module flash_attn.bert_padding: between padded batches (batch, seqlen, ...) and packed tokens (total, ...).

Differentiable. Lengths are read on the host, as in the original: max_seqlen is a Python int.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashtile.validation import fail

__all__ = [
    "IndexFirstAxis",
    "IndexFirstAxisResidual",
    "IndexPutFirstAxis",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


class IndexFirstAxis(torch.autograd.Function):
    """apply(input (rows, ...), indices int64 (total,)): the rows of these indices, (total, ...)."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> Tensor:
        _check_rows("input", input)
        ctx.save_for_backward(indices)
        ctx.rows = input.shape[0]
        return input[indices]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        grad = grad_output.new_zeros(ctx.rows, *grad_output.shape[1:])
        return grad.index_add_(0, indices, grad_output), None


class IndexPutFirstAxis(torch.autograd.Function):
    """apply(values (total, ...), indices int64 (total,), rows): (rows, ...), the values at the indices, 0 elsewhere."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
        _check_rows("values", values)
        if indices.ndim != 1:
            fail("indices", f"shape {tuple(indices.shape)}", "(total,)")
        ctx.save_for_backward(indices)
        output = values.new_zeros(first_axis_dim, *values.shape[1:])
        output[indices] = values
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return grad_output[indices], None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """apply(input (rows, ...), indices int64 (total,)): the rows of these indices, and the input for a residual."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        _check_rows("input", input)
        ctx.save_for_backward(indices)
        return input[indices], input.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_residual: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return grad_residual.index_add(0, indices, grad_output), None


index_first_axis: Callable[[Tensor, Tensor], Tensor] = IndexFirstAxis.apply
index_put_first_axis: Callable[[Tensor, Tensor, int], Tensor] = IndexPutFirstAxis.apply
index_first_axis_residual: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = IndexFirstAxisResidual.apply


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """The tokens that a mask shows, end to end.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or int, 1 where a token counts.
        unused_mask: the same form, 1 where a token has a place and does not count; no overlap with attention_mask.

    Returns:
        hidden_states (total, ...) of both masks' tokens; their indices int64 (total,) in the flattened batch;
        cu_seqlens int32 (batch + 1,); max_seqlen int; seqused int32 (batch,), the tokens of attention_mask alone.
    """
    present = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = present.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = present.flatten().nonzero().flatten()
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, *_ends(lengths), used


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The tokens of a batch whose rows each hold several sequences, end to end.

    attention_mask_in_length: int (batch, seqlen); a row such as [2, 3, 0, 0, 0, 0] holds a sequence of 2, then one of
    3 tokens, then padding. Returns what `unpad_input` does but for seqused, each sequence on its own in cu_seqlens.
    """
    filled = attention_mask_in_length.sum(dim=-1, keepdim=True)
    column = torch.arange(attention_mask_in_length.shape[-1], device=filled.device)
    indices = (column < filled).flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths.nonzero().flatten()]
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, *_ends(lengths)


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Packed tokens (total, ...) back at their indices of a (batch, seqlen, ...), 0 elsewhere."""
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _ends(lengths: Tensor) -> tuple[Tensor, int]:
    """(cu_seqlens, max_seqlen)"""
    cu_seqlens = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return cu_seqlens, int(lengths.max()) if lengths.numel() else 0


def _check_rows(name: str, tensor: Tensor) -> None:
    if tensor.ndim < 2:
        fail(name, f"shape {tuple(tensor.shape)}", "at least 2 dimensions, (rows, ...)")


def __getattr__(name: str) -> Any:
    # Software imports einops' two functions from here, because the original happens to have them.
    if name in ("rearrange", "repeat"):
        return getattr(importlib.import_module("einops"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
