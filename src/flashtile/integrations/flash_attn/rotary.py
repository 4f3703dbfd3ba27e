"""The module flash_attn.layers.rotary: rotary position embedding, out of place and in place, with gradients.

cos and sin are (positions, rotated / 2); token i of a sequence is turned by row i + seqlen_offsets. Computed in float32
and rounded once. An in-place call changes its input and returns it; gradients flow through what it returns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashtile.rotary import rotate
from flashtile.validation import check_is_tensor, fail

__all__ = [
    "ApplyRotaryEmb",
    "ApplyRotaryEmbKV_",
    "ApplyRotaryEmbQKV_",
    "RotaryEmbedding",
    "apply_rotary",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]

Offsets = int | Tensor


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Each pair (a, b) of the last dimension as (-b, a); pairs are the two halves, or neighbours if interleaved."""
    if interleaved:
        return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def apply_rotary_emb_torch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x (batch, seqlen, heads, head_dim) turned by cos, sin ((batch,) seqlen, rotated / 2), in the inputs' dtypes."""
    rotated = 2 * cos.shape[-1]
    if rotated > x.shape[-1]:
        fail("cos", f"{rotated} rotated elements", f"at most {x.shape[-1]}, the head_dim of x")
    doubled = [t.repeat_interleave(2, -1) if interleaved else torch.cat([t, t], -1) for t in (cos, sin)]
    whole_cos, whole_sin = (t.unsqueeze(-2) for t in doubled)
    turned = x[..., :rotated] * whole_cos + rotate_half(x[..., :rotated], interleaved) * whole_sin
    return torch.cat([turned, x[..., rotated:]], -1)


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Offsets = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """One turn, or with conjugate the turn back, without a gradient of its own; see `apply_rotary_emb`."""
    _check(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen)
    return _turn(x, cos, sin, seqlen_offsets, cu_seqlens, interleaved, inplace, conjugate)


def _turn(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: Offsets,
    cu_seqlens: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """`apply_rotary` of arguments that are known to be right."""
    if isinstance(seqlen_offsets, int) and cu_seqlens is None:
        rows = slice(seqlen_offsets, seqlen_offsets + x.shape[1])
        cos, sin = cos[rows], sin[rows]
    else:
        cos, sin = _rows(x, cos, sin, seqlen_offsets, cu_seqlens)
    if not inplace:
        return rotate(x, cos, sin, interleaved=interleaved, inverse=conjugate)
    # As the original's kernel does, without autograd's notice: it would refuse q and kv that share memory.
    memory = x.data
    rotate(memory, cos, sin, interleaved=interleaved, inverse=conjugate, out=memory)
    return x


def _check(
    x: Tensor, cos: Tensor, sin: Tensor, offsets: Offsets, cu_seqlens: Tensor | None, max_seqlen: int | None
) -> None:
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        check_is_tensor(name, tensor)
    rank = 4 if cu_seqlens is None else 3
    if x.ndim != rank:
        rows = "batch, seqlen" if cu_seqlens is None else "total"
        fail("x", f"shape {tuple(x.shape)}", f"({rows}, heads, head_dim)")
    if cos.ndim != 2 or 2 * cos.shape[1] > x.shape[-1]:
        fail("cos", f"shape {tuple(cos.shape)}", f"(positions, at most {x.shape[-1] // 2})")
    if sin.shape != cos.shape:
        fail("sin", f"shape {tuple(sin.shape)}", f"{tuple(cos.shape)}, as cos")
    if cu_seqlens is not None and max_seqlen is None:
        fail("max_seqlen", "None beside cu_seqlens", "the longest sequence")
    longest = x.shape[1] if cu_seqlens is None else max_seqlen
    assert longest is not None
    if isinstance(offsets, Tensor):
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if tuple(offsets.shape) != (batch,) or offsets.is_floating_point():
            fail("seqlen_offsets", f"{offsets.dtype} {tuple(offsets.shape)}", f"an int, or integers ({batch},)")
        offsets = 0
    if offsets < 0 or offsets + longest > cos.shape[0]:
        fail("cos", f"{cos.shape[0]} positions", f"at least {offsets + longest}, the last one's and more")


def _rows(x: Tensor, cos: Tensor, sin: Tensor, offsets: Offsets, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of the tables for each token, (batch, seqlen, half) or (total, half), without a wait for the device.

    A token whose position has no row, or that is in no sequence, stays as it is.
    """
    if cu_seqlens is None:
        position = torch.arange(x.shape[1], device=x.device)
        position = position + (offsets[:, None].long() if isinstance(offsets, Tensor) else offsets)
    else:
        token = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
        sequence = torch.searchsorted(cu_seqlens[1:], token, right=True).clamp(max=max(cu_seqlens.shape[0] - 2, 0))
        position = token - cu_seqlens[sequence]
        position = position + (offsets[sequence] if isinstance(offsets, Tensor) else offsets)
        position = position.masked_fill(token >= cu_seqlens[-1], -1)
    exists = ((position >= 0) & (position < cos.shape[0])).unsqueeze(-1)
    place = position.long().clamp(0, max(cos.shape[0] - 1, 0))
    return torch.where(exists, cos[place], 1.0), torch.where(exists, sin[place], 0.0)


class ApplyRotaryEmb(torch.autograd.Function):
    """apply(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen), see `apply_rotary_emb`"""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        interleaved: bool = False,
        inplace: bool = False,
        seqlen_offsets: Offsets = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        out = apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)
        _save(ctx, seqlen_offsets, cos, sin, cu_seqlens)
        ctx.interleaved = interleaved
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        offsets, cos, sin, cu_seqlens = _saved(ctx)
        dx = _turn(dout, cos, sin, offsets, cu_seqlens, ctx.interleaved, conjugate=True)
        return dx, *[None] * 7


class ApplyRotaryEmbQKV_(torch.autograd.Function):  # noqa: N801 - the original's name
    """apply(qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q), see `apply_rotary_emb_qkv_`"""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        cos_k: Tensor | None = None,
        sin_k: Tensor | None = None,
        interleaved: bool = False,
        seqlen_offsets: Offsets = 0,
        num_heads_q: int | None = None,
    ) -> Tensor:
        _check_qkv(qkv, num_heads_q)
        cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
        _save(ctx, seqlen_offsets, cos, sin, cos_k, sin_k)
        ctx.interleaved, ctx.num_heads_q = interleaved, num_heads_q
        q, k = _queries_keys(qkv, num_heads_q)
        apply_rotary(q, cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
        apply_rotary(k, cos_k, sin_k, seqlen_offsets, interleaved=interleaved, inplace=True)
        return qkv

    @staticmethod
    def backward(ctx: Any, dqkv: Tensor) -> tuple[Tensor | None, ...]:
        offsets, cos, sin, cos_k, sin_k = _saved(ctx)
        dqkv = dqkv.clone(memory_format=torch.contiguous_format)  # it may be shared, or expanded
        dq, dk = _queries_keys(dqkv, ctx.num_heads_q)
        for part, c, s in ((dq, cos, sin), (dk, cos_k, sin_k)):
            _turn(part, c, s, offsets, interleaved=ctx.interleaved, inplace=True, conjugate=True)
        return dqkv, *[None] * 7


class ApplyRotaryEmbKV_(torch.autograd.Function):  # noqa: N801 - the original's name
    """apply(kv, cos, sin, interleaved, seqlen_offsets), see `apply_rotary_emb_kv_`"""

    @staticmethod
    def forward(
        ctx: Any, kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: Offsets = 0
    ) -> Tensor:
        _check_packed("kv", kv, 2)
        _save(ctx, seqlen_offsets, cos, sin)
        ctx.interleaved = interleaved
        apply_rotary(kv[:, :, 0], cos, sin, seqlen_offsets, interleaved=interleaved, inplace=True)
        return kv

    @staticmethod
    def backward(ctx: Any, dkv: Tensor) -> tuple[Tensor | None, ...]:
        offsets, cos, sin = _saved(ctx)
        dkv = dkv.clone(memory_format=torch.contiguous_format)
        _turn(dkv[:, :, 0], cos, sin, offsets, interleaved=ctx.interleaved, inplace=True, conjugate=True)
        return dkv, *[None] * 4


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Offsets = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """x with the first elements of each head turned.

    Args:
        x: (batch, seqlen, heads, head_dim), or (total, heads, head_dim) with cu_seqlens.
        cos, sin: (positions, rotated / 2).
        interleaved: pairs are neighbours (GPT-J) instead of the two halves of the rotated elements (GPT-NeoX).
        inplace: write into x and return it.
        seqlen_offsets: position of each sequence's first token, int or integers (batch,). A token whose position has no
            row in the tables is not turned.
        cu_seqlens: int32 (batch + 1,), packed sequences; max_seqlen, the longest, comes with it.

    Raises TypeError or ValueError for a bad shape, or for tables too short for an int offset.
    """
    return ApplyRotaryEmb.apply(  # type: ignore[no-untyped-call]
        x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen
    )


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: Offsets = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """q and k of a packed qkv turned in place.

    qkv: (batch, seqlen, 3, heads, head_dim), or (batch, seqlen, num_heads_q + 2 * kv_heads, head_dim) with num_heads_q.
    cos_k, sin_k: tables for k, default those for q. The rest as `apply_rotary_emb`.
    """
    return ApplyRotaryEmbQKV_.apply(  # type: ignore[no-untyped-call]
        qkv, cos, sin, cos_k, sin_k, interleaved, seqlen_offsets, num_heads_q
    )


def apply_rotary_emb_kv_(
    kv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, seqlen_offsets: Offsets = 0
) -> Tensor:
    """k of a packed kv (batch, seqlen, 2, heads, head_dim) turned in place; the rest as `apply_rotary_emb`."""
    return ApplyRotaryEmbKV_.apply(kv, cos, sin, interleaved, seqlen_offsets)  # type: ignore[no-untyped-call]


def _save(ctx: Any, offsets: Offsets, *tensors: Tensor | None) -> None:
    held = isinstance(offsets, Tensor)
    ctx.offsets = None if held else offsets
    ctx.save_for_backward(*([offsets] if held else []), *tensors)


def _saved(ctx: Any) -> tuple[Any, ...]:
    """(seqlen_offsets, *tensors) as they were given to `_save`."""
    return ctx.saved_tensors if ctx.offsets is None else (ctx.offsets, *ctx.saved_tensors)


def _queries_keys(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor]:
    """Views of q and k, of a qkv that `_check_qkv` has passed."""
    if num_heads_q is None or qkv.ndim == 5:
        return qkv[:, :, 0], qkv[:, :, 1]
    kv_heads = (qkv.shape[2] - num_heads_q) // 2
    return qkv[:, :, :num_heads_q], qkv[:, :, num_heads_q : num_heads_q + kv_heads]


def _check_qkv(qkv: Tensor, num_heads_q: int | None) -> None:
    if qkv.ndim == 5:
        _check_packed("qkv", qkv, 3)
        return
    if qkv.ndim != 4:
        fail("qkv", f"shape {tuple(qkv.shape)}", "(batch, seqlen, 3, heads, head_dim), or 4-D with num_heads_q")
    if num_heads_q is None:
        fail("num_heads_q", "None beside a 4-D qkv", "the number of query heads")
    kv_heads, rest = divmod(qkv.shape[2] - num_heads_q, 2)
    if rest or kv_heads < 0:
        fail("num_heads_q", num_heads_q, f"an even number of heads less than the {qkv.shape[2]} of qkv")


def _check_packed(name: str, tensor: Tensor, parts: int) -> None:
    check_is_tensor(name, tensor)
    if tensor.ndim != 5 or tensor.shape[2] != parts:
        fail(name, f"shape {tuple(tensor.shape)}", f"(batch, seqlen, {parts}, heads, head_dim)")


class RotaryEmbedding(nn.Module):
    """Rotary embedding of `dim` elements with tables that grow as needed; with scale_base, xPos (arXiv 2212.10554).

    Args:
        dim: elements of each head that are turned.
        base: the slowest pair's wavelength is 2 pi base.
        interleaved: as `apply_rotary_emb`.
        scale_base: xPos's decay length in tokens; None for plain rotary embedding.
        device: of the buffers.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.inv_freq: Tensor
        self.scale: Tensor
        self.dim, self.base, self.interleaved, self.scale_base = dim, float(base), interleaved, scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None if scale_base is None else self._compute_scale(device)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        return self.base ** -(torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim)

    def _compute_scale(self, device: torch.device | str | None = None) -> Tensor:
        step = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return (step + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Makes tables of at least seqlen positions in a dtype; angles are float32 whatever the module's dtype."""
        have = self._cos_cached
        stale = have is None or have.device != device or have.dtype != dtype or (self.training and have.is_inference())
        if not stale and seqlen <= self._seq_len_cached:
            return
        self._seq_len_cached = seqlen
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        inv_freq = self.inv_freq if self.inv_freq.dtype == torch.float32 else self._compute_inv_freq(device)
        angle = torch.outer(position, inv_freq.to(device))
        cos, sin = angle.cos(), angle.sin()
        if self.scale_base is not None:
            power = (position - seqlen // 2) / self.scale_base
            base = self.scale if self.scale.dtype == torch.float32 else self._compute_scale(device)
            scale = base.to(device) ** power[:, None]
            self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)
            cos, sin = cos * scale, sin * scale
        self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: Offsets = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turns q and k in place and returns qkv, or (q, kv).

        qkv: as `apply_rotary_emb_qkv_`; with kv (batch, seqlen, 2, kv_heads, head_dim), q alone (batch, seqlen, heads,
        head_dim). seqlen_offset: int, or integers (batch,), and then max_seqlen says how long the tables must be.
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        elif isinstance(seqlen_offset, int):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, qkv.device, qkv.dtype)
        if self._cos_cached is None or self._sin_cached is None:
            fail("max_seqlen", "None beside a tensor of offsets", "how many positions the tables need")
        cos, sin, cos_k, sin_k = self._cos_cached, self._sin_cached, self._cos_k_cached, self._sin_k_cached
        if kv is None:
            return apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q)
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, seqlen_offset)
