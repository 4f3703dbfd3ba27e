"""Exact merging of attention results over disjoint sets of keys, and the sink as a special case of it.

Two partial results (out_a, lse_a) and (out_b, lse_b) of the same queries combine to

    lse = log(exp(lse_a) + exp(lse_b))        out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

which is the split softmax of FlashAttention (Dao et al. 2022, section 3.1). A sink is a state with lse = sink, out = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merges attention results of the same queries over disjoint key sets into the result over all of them.

    Args:
        outs: each (batch, q_len, heads, v_dim), or (total_q, heads, v_dim) for packed sequences.
        lses: each (batch, heads, q_len), or (heads, total_q): natural logarithm, -inf for a row that saw nothing.

    Returns:
        (out, lse) in the shapes of the parts; out has the dtype of the first part, lse that of the first lse.
        Differentiable in every part.

    Raises:
        ValueError: no parts, or parts whose number or shapes differ.
        TypeError: a part that is not a tensor.

    Merging parts that were each computed with sinks counts the sinks once per part: give them to one part only.
    """
    _check_states(outs, lses)
    stacked = torch.stack([lse.to(torch.promote_types(lse.dtype, torch.float32)) for lse in lses])
    top = stacked.detach().amax(0)
    # A row that no part saw has lse -inf: its weights are exp(-inf - 0) = 0, not NaN.
    shares = torch.exp(stacked - top.masked_fill(top == -torch.inf, 0.0))
    total = shares.sum(0)
    blind = total == 0
    total = total.masked_fill(blind, 1.0)
    lse = (top + torch.log(total)).masked_fill(blind, -torch.inf)
    # Divided by their own sum, weights add up to 1 however coarsely a large lse is rounded.
    weights = (shares / total).transpose(-1, -2)[..., None]  # [parts, ..., q_len, heads, 1]
    out = sum(weight * part.to(weight.dtype) for weight, part in zip(weights, outs, strict=True))
    assert isinstance(out, Tensor)
    return out.to(outs[0].dtype), lse.to(lses[0].dtype)


def _check_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)) or not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(f"{name}: got {type(parts).__name__}, expected a list or tuple of tensors")
    if not outs or len(outs) != len(lses):
        raise ValueError(f"lses: got {len(lses)} parts, expected {max(len(outs), 1)}, one for each of outs")
    rows, heads = outs[0].shape[-3:-1] if outs[0].ndim >= 3 else (None, None)
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.ndim not in (3, 4) or out.shape != outs[0].shape:
            raise ValueError(f"outs[{index}]: got shape {tuple(out.shape)}, expected {tuple(outs[0].shape)} of 3 or 4")
        for name, part in ((f"outs[{index}]", out), (f"lses[{index}]", lse)):
            if not part.is_floating_point():
                raise TypeError(f"{name}: got {part.dtype}, expected a floating-point dtype")
            if part.device != outs[0].device:
                raise ValueError(f"{name}: got device {part.device}, expected {outs[0].device}, the device of outs[0]")
        expected = (*out.shape[:-3], heads, rows)
        if tuple(lse.shape) != expected:
            raise ValueError(f"lses[{index}]: got shape {tuple(lse.shape)}, expected {expected}")


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the sinks, (heads,): the sink's probability times (0 - delta), summed over batch and rows.

    lse: (batch, heads, q_len) or (heads, total_q), with the sink counted in. delta: the same shape,
    rowsum(dout * out) - dlse; the sink's own dP is 0, since its value is 0.
    """
    logits = sinks.to(lse.dtype)[:, None]
    seen = torch.where(lse == -torch.inf, torch.full_like(lse, torch.inf), lse)
    per_row = torch.exp(logits - seen) * delta
    heads = per_row.movedim(-2, 0).flatten(1)
    return -heads.sum(1).to(sinks.dtype)
