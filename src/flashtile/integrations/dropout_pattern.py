"""The third result of flash_attn's return_attn_probs: which weights dropout took, for tests of dropout.

Quadratic in sequence length and in plain PyTorch operations, as in the original "for testing only".
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
    weight. Lengths are max_seqlen_q and max_seqlen_k for packed sequences, one of them to a batch entry. A row may
    differ from the original's by a constant factor: there, it is relative to the largest score of the row so far.
    """
    call = unpack(call)
    if call.rng is None:
        return call.q.new_empty(0)
    with torch.no_grad():
        if call.cu_seqlens_q is None:
            return _pad(_signed(call, 0), call.q.shape[1], call.k.shape[1])
        return torch.cat([_pad(s, call.max_seqlen_q, call.max_seqlen_k) for s in _sequences(call)])


def _sequences(call: Call) -> list[Tensor]:
    q_ends, k_ends = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    signed = []
    for index in range(len(q_ends) - 1):
        rows, keys = slice(q_ends[index], q_ends[index + 1]), slice(k_ends[index], k_ends[index + 1])
        slopes = call.alibi_slopes
        slopes = slopes[index : index + 1] if slopes is not None and slopes.ndim == 2 else slopes
        one = call._replace(q=call.q[None, rows], k=call.k[None, keys], alibi_slopes=slopes)
        signed.append(_signed(one, index))
    return signed


def _signed(call: Call, first_batch: int) -> Tensor:
    q, k = call.q.transpose(1, 2), call.k.transpose(1, 2)  # [batch, heads, seqlen, head_dim]
    batch, heads, q_len, k_len = *q.shape[:3], k.shape[2]
    work = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(heads // k.shape[1], 1).to(work)
    scores = call.scale * q.to(work) @ k.transpose(-1, -2)
    if call.softcap > 0:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    row = torch.arange(q_len, device=q.device)[:, None]
    column = torch.arange(k_len, device=q.device)
    if call.alibi_slopes is not None:
        distance = (row + k_len - q_len - column).abs()
        scores = scores - call.alibi_slopes.to(work)[..., None, None] * distance
    lowered = masks.Lowered(call.window_left, call.window_right, call.lo, call.hi)
    lo, hi = masks.interval_rows(lowered, q_len, k_len, q.device)
    hidden = (column < lo[..., None]) | (column >= hi[..., None])
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    top = scores.amax(-1, keepdim=True) if k_len else scores.sum(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    batch_head = first_batch * heads + torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
    kept = keep_mask(call.rng, call.dropout_p, batch_head, row, column)
    return torch.where(kept, weights, -weights).to(q.dtype)


def _pad(signed: Tensor, q_len: int, k_len: int) -> Tensor:
    rows, columns = (-(-length // _ROUNDING) * _ROUNDING for length in (q_len, k_len))
    return F.pad(signed, (0, columns - signed.shape[3], 0, rows - signed.shape[2]))
