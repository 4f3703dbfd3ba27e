"""Multi-head attention with PyTorch's parameters and arguments."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashtile import masks, ops
from flashtile.api import prepare
from flashtile.dropout import keep_mask
from flashtile.problem import Call, unpack
from flashtile.validation import check_is_tensor, fail


class MultiheadAttention(nn.MultiheadAttention):
    """torch.nn.MultiheadAttention on flashtile: its arguments, its parameters, its state dict.

    Differences: `is_causal=True` is a causal mask by itself, where PyTorch wants attn_mask beside it; a row that sees
    nothing gives the bias of the output projection and weights of 0, where PyTorch gives NaN; a query, key and value
    that are one tensor are projected at once and never separated. Weights (need_weights=True, the default as with
    PyTorch) are computed beside the output, in memory quadratic in length: leave them away where you can.

    Source: "Attention is all you need" (Vaswani et al. 2017), section 3.2.2; torch.nn.MultiheadAttention.

    >>> import torch, flashtile
    >>> attention = flashtile.nn.MultiheadAttention(64, 4, batch_first=True)
    >>> x = torch.randn(2, 10, 64)
    >>> attention(x, x, x, need_weights=False, is_causal=True)[0].shape
    torch.Size([2, 10, 64])
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The output and, with need_weights, the attention weights.

        Args:
            query: (q_len, batch, embed_dim), (batch, q_len, embed_dim) with batch_first, or (q_len, embed_dim).
            key, value: the same with k_len, kdim and vdim.
            key_padding_mask: (batch, k_len) or (k_len,); boolean, True is hidden, or added to the scores.
            need_weights: also return the weights, averaged over heads unless average_attn_weights is False.
            attn_mask: (q_len, k_len) or (batch * num_heads, q_len, k_len); boolean, True is hidden, or added.
            is_causal: row i sees keys 0 to i. An attn_mask beside it must say the same, and is not read.

        Returns:
            (out, weights): out in query's shape; weights (batch, [num_heads,] q_len, k_len), or None.

        Raises:
            TypeError, ValueError: a bad argument, with got and expected.
        """
        batched = self._check(query, key, value)
        self_attention = query is key is value
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        call = self._projected(query, key, value, self_attention, key is value)
        mask, bias = self._masked(call, key_padding_mask, attn_mask, is_causal)
        call = prepare(call._replace(bias=bias), mask, None, None)
        out, lse = ops.attention(call)
        out = self.out_proj(out.flatten(2))
        weights = _weights(call, lse) if need_weights else None
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether there is a batch dimension."""
        sizes = (("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim))
        for name, tensor, size in sizes:
            check_is_tensor(name, tensor)
            if tensor.ndim not in (2, 3) or tensor.ndim != query.ndim or tensor.shape[-1] != size:
                fail(name, f"shape {tuple(tensor.shape)}", f"2 or 3 dimensions as query, the last of {size}")
        if key.shape[:-1] != value.shape[:-1]:
            fail("value", f"shape {tuple(value.shape)}", f"{tuple(key.shape[:-1])} before its features, as key")
        return query.ndim == 3

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, one_tensor: bool, key_is_value: bool) -> Call:
        """q, k and v as the call takes them: in one tensor where the inputs are one and nothing is appended to k."""
        heads, dim = self.num_heads, self.head_dim
        weight, bias = self.in_proj_weight, self.in_proj_bias
        appended = self.bias_k is not None or self.add_zero_attn
        dropout_p = self.dropout if self.training else 0.0
        if weight is not None and one_tensor and not appended:
            qkv = F.linear(query, weight, bias).unflatten(-1, (3, heads, dim))
            return Call(qkv, None, None, dropout_p=dropout_p)
        size = self.embed_dim
        if weight is not None and key_is_value and not appended:
            b_q, b_kv = (None, None) if bias is None else bias.split((size, 2 * size))
            w_q, w_kv = weight.split((size, 2 * size))
            kv = F.linear(key, w_kv, b_kv).unflatten(-1, (2, heads, dim))
            return Call(F.linear(query, w_q, b_q).unflatten(-1, (heads, dim)), kv, None, dropout_p=dropout_p)
        separate = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        in_weights = separate if weight is None else weight.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), in_weights, biases, strict=True))
        k, v = self._with_appended(k, self.bias_k), self._with_appended(v, self.bias_v)
        q, k, v = (x.unflatten(-1, (heads, dim)) for x in (q, k, v))
        return Call(q, k, v, dropout_p=dropout_p)

    def _with_appended(self, x: Tensor, row: Tensor | None) -> Tensor:
        """Keys or values, (batch, k_len, embed_dim), with the learned row and the row of zeros that were asked for."""
        rows = [] if row is None else [row]
        rows += [x.new_zeros(1, 1, x.shape[-1])] if self.add_zero_attn else []
        return torch.cat([x, *(r.to(x.dtype).expand(x.shape[0], 1, -1) for r in rows)], 1) if rows else x

    def _masked(
        self, call: Call, key_padding_mask: Tensor | None, attn_mask: Tensor | None, is_causal: bool
    ) -> tuple[masks.Mask | None, Tensor | None]:
        """The causal mask as an interval, all else as a bias: True is seen here."""
        q, k, _ = unpack(call)[:3]
        batch, q_len, appended = q.shape[0], q.shape[1], (self.bias_k is not None) + self.add_zero_attn
        k_len = k.shape[1] - appended
        mask: masks.Mask | None = None
        if is_causal and not appended:
            mask, attn_mask = masks.Window(None, q_len - k_len), None
        elif is_causal and attn_mask is None:
            attn_mask = torch.ones(q_len, k_len, dtype=torch.bool, device=q.device).triu(1)
        parts = []
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, ((batch, k_len),))
            parts.append(_seen(key_padding_mask)[:, None, None])
        if attn_mask is not None:
            _check_mask("attn_mask", attn_mask, ((q_len, k_len), (batch * self.num_heads, q_len, k_len)))
            seen = _seen(attn_mask)
            parts.append(seen if seen.ndim == 2 else seen.unflatten(0, (batch, self.num_heads)))
        if appended:
            parts = [F.pad(part, (0, appended), value=part.dtype == torch.bool) for part in parts]
        bias = None if not parts else parts[0] if len(parts) == 1 else _together(*parts)
        return mask, bias if bias is None or bias.dtype == torch.bool else bias.to(q.dtype)


def _check_mask(name: str, mask: Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    check_is_tensor(name, mask)
    if tuple(mask.shape) not in shapes:
        fail(name, f"shape {tuple(mask.shape)}", " or ".join(map(str, shapes)))
    if mask.dtype != torch.bool and not mask.is_floating_point():
        fail(name, mask.dtype, "bool (True is hidden) or a floating-point dtype", TypeError)


def _seen(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else mask


def _together(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == b.dtype == torch.bool:
        return a & b
    if torch.bool not in (a.dtype, b.dtype):
        return a + b
    seen, added = (a, b) if a.dtype == torch.bool else (b, a)
    return torch.where(seen, added, -torch.inf)


def _weights(call: Call, lse: Tensor) -> Tensor:
    """The weights that the output was made with, dropout included: exp(s - lse), (batch, heads, q_len, k_len)."""
    q, k, _ = unpack(call)[:3]
    q, k = (x.transpose(1, 2).to(lse.dtype) for x in (q, k))
    s = call.scale * q @ k.transpose(-1, -2)
    row, column = (torch.arange(n, device=q.device) for n in s.shape[-2:])
    if call.window_right is not None:
        hidden = column > row[:, None] + call.window_right + s.shape[-1] - s.shape[-2]
        s = s.masked_fill(hidden, -torch.inf)
    if call.bias is not None:
        s = s.masked_fill(~call.bias, -torch.inf) if call.bias.dtype == torch.bool else s + call.bias
    blind = (lse == -torch.inf)[..., None]
    p = (s - lse[..., None].masked_fill(blind, 0.0)).exp()
    if call.rng is not None:
        batch_head = torch.arange(s.shape[0] * s.shape[1], device=q.device).view(*s.shape[:2], 1, 1)
        keep = keep_mask(call.rng, call.dropout_p, batch_head, row[:, None], column)
        p = p.masked_fill(~keep, 0.0) / (1 - call.dropout_p if call.dropout_p < 1 else 1)
    return p.masked_fill(blind, 0.0).to(call.q.dtype)
