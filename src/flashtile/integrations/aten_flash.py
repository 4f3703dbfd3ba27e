"""flashtile inside PyTorch's dispatcher: `torch.nn.attention.activate_flash_attention_impl("FLASHTILE")`.

PyTorch's own scaled_dot_product_attention, torch.nn modules and torch.nn.attention.varlen_attn then reach flashtile
wherever PyTorch itself chooses its flash kernel on a GPU: by its rules (half precision, no mask, head dim to 256), with
its own autograd and compilers around. `replace_sdpa` serves far more calls; this one changes no Python name.

Source: torch.nn.attention.register_flash_attention_impl; the signatures are those of the ATen operators.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from flashtile import masks
from flashtile.api import prepare
from flashtile.execution import run_backward, run_forward
from flashtile.problem import Call

NAME = "FLASHTILE"


class Handle:
    """Keeps the kernels in PyTorch's dispatcher until `remove`."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            # flashtile itself takes PyTorch's kernel on a CPU where that is the faster one.
            raise RuntimeError(
                f"{NAME}: takes the place of PyTorch's CUDA kernel, but there is no CUDA device; "
                "flashtile.replace_sdpa() works on every device"
            )
        self._library: Any = torch.library.Library("aten", "IMPL", "CUDA")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "[\\s\\S]*Overriding a previously registered kernel")  # the very purpose
            for name, kernel in _KERNELS.items():
                self._library.impl(name, kernel, "CUDA")

    def remove(self) -> None:
        if self._library is not None:
            self._library._destroy()
        self._library = None


def register() -> None:
    """Makes the name known to PyTorch, where it has such a list; nothing changes until somebody activates it."""
    if hasattr(torch.nn.attention, "register_flash_attention_impl"):
        torch.nn.attention.register_flash_attention_impl(NAME, register_fn=Handle)


def _call(
    q: Tensor, k: Tensor, v: Tensor, mask: masks.Mask | None, scale: float | None, dropout_p: float, **features: Any
) -> Call:
    """A call in our layout, (batch, seqlen, heads, head_dim) or packed."""
    return prepare(Call(q, k, v, dropout_p=dropout_p, **features), mask, scale, None)


def _with_state(call: Call, rng_state: Tensor) -> Call:
    """The forward's call, with dropout's random state as it was then."""
    return call._replace(rng=rng_state.view(torch.int64)) if call.dropout_p > 0 else call


def _seqlen_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.transpose(1, 2) for t in tensors)


def _random_state(call: Call) -> tuple[Tensor, Tensor]:
    """Dropout's state in the two slots that ATen has for it."""
    state = (
        torch.zeros(2, dtype=torch.uint64, device=call.q.device) if call.rng is None else call.rng.view(torch.uint64)
    )
    return state, torch.zeros((), dtype=torch.uint64, device=call.q.device)


def _check_unserved(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and value is not False:
            raise NotImplementedError(
                f"{name}: got {type(value).__name__}, which {NAME} does not serve; "
                "torch.nn.attention.restore_flash_attention_impl() gives PyTorch's own kernel back"
            )


def _gradients(call: Call, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Any, Any, Any]:
    return run_backward(dout, None, out, lse.contiguous(), False, *call)[:3]


def _sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """A causal mask is bottom-right here; PyTorch's own function asks for one with equal lengths only."""
    _check_unserved(return_debug_mask=return_debug_mask)
    q, k, v = _seqlen_first(query, key, value)
    call = _call(q, k, v, masks.Causal() if is_causal else None, scale, dropout_p)
    out, lse = run_forward(call)
    lengths = (query.shape[2], key.shape[2])
    return (out.transpose(1, 2), lse, None, None, *lengths, *_random_state(call), query.new_empty(0))


def _sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    q, k, v, dout, out = _seqlen_first(query, key, value, grad_out, out)
    call = _call(q, k, v, masks.Causal() if is_causal else None, scale, 0.0)
    call = _with_state(call._replace(dropout_p=dropout_p), philox_seed)
    return _seqlen_first(*_gradients(call, dout, out, logsumexp))


def _band(is_causal: bool, left: int | None, right: int | None) -> masks.Mask:
    left, right = (None if side is None or side < 0 else side for side in (left, right))
    if is_causal:
        right = 0 if right is None else min(right, 0)
    return masks.Window(left, right)


def _lengths(cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int) -> dict[str, Any]:
    if cum_seq_q is None:
        return {}
    return {"cu_seqlens_q": cum_seq_q, "cu_seqlens_k": cum_seq_k, "max_seqlen_q": max_q, "max_seqlen_k": max_k}


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Layout (batch, seqlen, heads, head_dim), or packed sequences; a num_splits of 1 is what flashtile does anyway."""
    _check_unserved(return_debug_mask=return_debug_mask, seqused_k=seqused_k, block_table=block_table)
    _check_unserved(num_splits=None if num_splits in (0, 1) else num_splits)
    lengths = _lengths(cum_seq_q, cum_seq_k, max_q, max_k)
    mask = _band(is_causal, window_size_left, window_size_right)
    call = _call(query, key, value, mask, scale, dropout_p, alibi_slopes=alibi_slopes, **lengths)
    result, lse = run_forward(call, out)
    return (result, lse, *_random_state(call), query.new_empty(0))


def _forward_inplace(out: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return _forward(*arguments, **options, out=out)[1]


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = _lengths(cum_seq_q, cum_seq_k, max_q, max_k)
    mask = _band(is_causal, window_size_left, window_size_right)
    call = _call(query, key, value, mask, scale, 0.0, **lengths)
    call = _with_state(call._replace(dropout_p=dropout_p), rng_state)
    return _gradients(call, grad_out, out, logsumexp)


_KERNELS = {
    "_scaled_dot_product_flash_attention": _sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": _sdpa_backward,
    "_flash_attention_forward": _forward,
    "_flash_attention_forward_no_dropout_inplace": _forward_inplace,
    "_flash_attention_backward": _backward,
}
