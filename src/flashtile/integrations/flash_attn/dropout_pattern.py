"""The third result of flash_attn's return_attn_probs: which weights dropout took, for tests of dropout.

Quadratic in sequence length, in plain PyTorch operations, and for packed sequences with a wait for the device: it is
for testing only, as in the original.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashtile import masks
from flashtile.dropout import keep_mask
from flashtile.problem import Call, unpack

_ROUNDING = 128


def signed_probabilities(call: Call) -> Tensor:
    """(batch, heads, q_len, k_len), both lengths rounded up to 128, in q's dtype; empty without dropout.

    The magnitude is exp(score - the row's largest score), 0 for hidden keys; the sign bit is set where dropout took the
    weight. Packed sequences have max_seqlen_q and max_seqlen_k for lengths, and one batch entry each. A row may differ
    from the original's by a constant factor: there it is relative to the largest score met so far.
    """
    call = unpack(call)
    if call.rng is None:
        return call.q.new_empty(0)
    with torch.no_grad():
        if call.cu_seqlens_q is None or call.cu_seqlens_k is None:
            return _pad(_signed(call, call.rng, 0), call.q.shape[1], call.k.shape[1])
        ends = zip(call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist(), strict=True)
        result = []
        row, key = next(ends)
        for index, (row_end, key_end) in enumerate(ends):
            one = _sequence(call, index, slice(row, row_end), slice(key, key_end))
            result.append(_pad(_signed(one, call.rng, index), call.max_seqlen_q or 0, call.max_seqlen_k or 0))
            row, key = row_end, key_end
        return torch.cat(result) if result else call.q.new_empty(0)


def _sequence(call: Call, index: int, rows: slice, keys: slice) -> Call:
    """One packed sequence as a dense call of batch 1."""
    assert call.k is not None
    own = slice(index, index + 1)
    slopes = (
        call.alibi_slopes[own] if call.alibi_slopes is not None and call.alibi_slopes.ndim == 2 else call.alibi_slopes
    )
    return call._replace(q=call.q[None, rows], k=call.k[None, keys], alibi_slopes=slopes)


def _signed(call: Call, rng: Tensor, first_batch: int) -> Tensor:
    assert call.k is not None
    q, k = call.q.transpose(1, 2), call.k.transpose(1, 2)  # [batch, heads, seqlen, head_dim]
    batch, heads, q_len, k_len = *q.shape[:3], k.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(heads // max(1, k.shape[1]), 1).to(work)
    scores = call.scale * q.to(work) @ k.transpose(-1, -2)
    if call.softcap > 0:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    row, column = torch.arange(q_len, device=q.device)[:, None], torch.arange(k_len, device=q.device)
    if call.alibi_slopes is not None:
        scores = scores - call.alibi_slopes.to(work)[..., None, None] * (row + k_len - q_len - column).abs()
    lo, hi = masks.interval_rows(masks.Lowered(call.window_left, call.window_right), q_len, k_len, q.device)
    hidden = (column < lo[..., None]) | (column >= hi[..., None])
    scores = scores.masked_fill(hidden, -torch.inf)
    if k_len:
        top = scores.amax(-1, keepdim=True)
        scores = scores - top.masked_fill(top == -torch.inf, 0.0)
    batch_head = first_batch * heads + torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
    weights = torch.exp(scores)
    kept = keep_mask(rng, call.dropout_p, batch_head, row, column)
    return torch.where(kept, weights, -weights).to(q.dtype)


def _pad(signed: Tensor, q_len: int, k_len: int) -> Tensor:
    rows, columns = (-(-length // _ROUNDING) * _ROUNDING for length in (q_len, k_len))
    return F.pad(signed, (0, columns - signed.shape[3], 0, rows - signed.shape[2]))
