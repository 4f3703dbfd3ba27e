"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flashtile.validation import check_is_tensor, fail


class RotaryEmbedding(nn.Module):
    """Turns queries and keys by their positions, so that a score depends on the distance of the two alone.

    Pair i of the first `dim` features of a head is turned by the angle position / base^(2i / dim). There are no
    parameters, and nothing in the state dict.

    Args:
        dim: features of a head that are turned, even; those behind them stay as they are.
        base: the wavelengths reach from 2 pi to 2 pi base; default 10000.
        interleaved: pairs are features (0, 1), (2, 3) ... (GPT-J); default (0, dim / 2), (1, dim / 2 + 1) ... (Llama).

    Source: RoFormer (Su et al. 2021, arXiv 2104.09864), section 3.2.

    >>> import torch, flashtile
    >>> rotary = flashtile.nn.RotaryEmbedding(64)
    >>> q, k = torch.randn(1, 128, 8, 64), torch.randn(1, 128, 2, 64)
    >>> [x.shape for x in rotary(q, k)]
    [torch.Size([1, 128, 8, 64]), torch.Size([1, 128, 2, 64])]
    """

    inverse_frequency: Tensor

    def __init__(
        self, dim: int, base: float = 10000.0, *, interleaved: bool = False, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 2 or dim % 2:
            fail("dim", repr(dim), "an even int of at least 2")
        if not base > 0:
            fail("base", base, "a positive number")
        self.dim, self.base, self.interleaved = dim, base, interleaved
        exponent = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
        self.register_buffer("inverse_frequency", base**-exponent, persistent=False)

    def forward(
        self, q: Tensor, k: Tensor, *, offset: int | Tensor = 0, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """q and k turned, in their own dtypes; computed in float32 at least, and differentiable.

        Args:
            q: (batch, seqlen, heads, head_dim), or packed sequences (total, heads, head_dim) with positions.
            k: the same with its own number of heads.
            offset: position of the first row, such as the length of a cache; an int, or integers (batch,).
            positions: integers (seqlen,) or (batch, seqlen), instead of offset; (total,) for packed sequences.

        Raises:
            TypeError, ValueError: a bad argument, with got and expected.
        """
        for name, tensor in (("q", q), ("k", k)):
            check_is_tensor(name, tensor)
            if tensor.ndim not in (3, 4) or tensor.shape[-1] < self.dim:
                fail(name, f"shape {tuple(tensor.shape)}", f"([batch,] seqlen, heads, head_dim of {self.dim} or more)")
        if k.shape[:-2] != q.shape[:-2]:
            fail("k", f"shape {tuple(k.shape)}", f"{tuple(q.shape[:-2])} before heads, as q")
        angles = self._positions(q, offset, positions)[..., None] * self.inverse_frequency
        cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)  # [(batch,) seqlen, 1, dim / 2]
        return self._turned(q, cos, sin), self._turned(k, cos, sin)

    def _positions(self, q: Tensor, offset: int | Tensor, positions: Tensor | None) -> Tensor:
        """(seqlen,) or (batch, seqlen)"""
        rows = q.shape[:-2]
        if positions is not None:
            check_is_tensor("positions", positions)
            if not isinstance(offset, int) or offset != 0:
                fail("offset", "an offset beside positions", "one or the other")
            if tuple(positions.shape) not in (tuple(rows), tuple(rows[-1:])):
                fail("positions", f"shape {tuple(positions.shape)}", f"{tuple(rows[-1:])} or {tuple(rows)}")
            return positions
        if q.ndim == 3:
            fail("q", f"shape {tuple(q.shape)} without positions", "4 dimensions, or positions (total,)")
        if isinstance(offset, Tensor) and offset.ndim > 0:
            if tuple(offset.shape) != (rows[0],):
                fail("offset", f"shape {tuple(offset.shape)}", f"an int or ({rows[0]},)")
            offset = offset[:, None]
        return torch.arange(rows[1], device=q.device) + offset

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        turning, rest = wide[..., : self.dim], x[..., self.dim :]
        a, b = (turning[..., 0::2], turning[..., 1::2]) if self.interleaved else turning.chunk(2, -1)
        pair = (a * cos - b * sin, a * sin + b * cos)
        turned = torch.stack(pair, -1).flatten(-2) if self.interleaved else torch.cat(pair, -1)
        return torch.cat([turned.to(x.dtype), rest], -1) if rest.shape[-1] else turned.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}, interleaved={self.interleaved}"
