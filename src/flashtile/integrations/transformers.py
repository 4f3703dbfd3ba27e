"""transformers 5 on flashtile: `register()`, then `attn_implementation="flashtile"` for any model of the library.

transformers treats every implementation with "flash" in its name as a flash attention: models may hand over the packed
form (`cu_seq_lens_q`), a padding mask of two dimensions, and no mask at all where `is_causal` says it. All of this is
honoured here, and so is what eager attention has: biases, masks of four dimensions, sinks, softcap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from flashtile import masks, ops
from flashtile.api import prepare, renamed
from flashtile.integrations.transformers_masks import attention_mask_for, from_table, is_table
from flashtile.integrations.transformers_packing import (
    Bounds,
    band_bounds,
    from_offsets,
    from_positions,
    intersection,
)
from flashtile.problem import Call

NAME = "flashtile"

_NAMES = {
    "q": "query", "k": "key", "v": "value", "bias": "attention_mask or position_bias", "sinks": "s_aux",
    "scale": "scaling", "dropout_p": "dropout", "cu_seqlens_q": "cu_seq_lens_q", "cu_seqlens_k": "cu_seq_lens_k",
    "max_seqlen_q": "max_length_q", "max_seqlen_k": "max_length_k",
}  # fmt: skip

# What models pass along that says nothing about the numbers of one attention call: the rotary position was applied
# before, the mask was made from positions before, caches were updated before, outputs are collected after.
_ABOUT_OTHER_THINGS = frozenset(
    {
        "position_ids", "position_embeddings", "past_key_values", "use_cache", "cache_position", "layer_idx",
        "output_hidden_states", "output_router_logits", "num_items_in_batch", "seq_idx", "return_dict", "labels",
        "logits_to_keep", "encoder_hidden_states", "encoder_attention_mask", "token_type_ids", "mm_token_type_ids",
    }
)  # fmt: skip


def register() -> None:
    """Makes `attn_implementation="flashtile"` known to transformers, for this process. Calling it again is fine.

    Then `AutoModel.from_pretrained(..., attn_implementation="flashtile")`, `from_config` and
    `model.set_attn_implementation("flashtile")` work; a model that does not take its attention from transformers'
    interface is refused when it is made.

    Raises:
        ImportError: transformers is not installed, or is none that flashtile knows: older than 5, or far newer.

    Source: transformers, "Attention backends"; `AttentionInterface` and `AttentionMaskInterface`.
    """
    check = getattr(PreTrainedModel, "_check_and_adjust_attn_implementation", None)
    if check is None or int(transformers.__version__.split(".")[0]) < 5:
        raise ImportError(f"transformers: got version {transformers.__version__}, expected one like 5.23")
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask_for)
    if not hasattr(check, "knows_flashtile"):
        PreTrainedModel._check_and_adjust_attn_implementation = _knowing_flashtile(check)


def _knowing_flashtile(check: Callable[..., str]) -> Callable[..., str]:
    """transformers would look for a package or a Hub kernel by a name with "flash" in it, or take another's."""

    @wraps(check)
    def checked(model: Any, attn_implementation: str | None, *arguments: Any, **keywords: Any) -> str:
        if attn_implementation != NAME:
            return check(model, attn_implementation, *arguments, **keywords)
        if not model._can_set_attn_implementation():
            raise ValueError(
                f"attn_implementation: got 'flashtile' for {type(model).__name__}, whose code does not take its "
                "attention from transformers' AttentionInterface; use attn_implementation='sdpa' and "
                "flashtile.replace_sdpa()"
            )
        return NAME

    checked.knows_flashtile = True  # type: ignore[attr-defined]
    return checked


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    deterministic: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | Tensor | None = None,
    max_length_k: int | Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention layer of a transformers model.

    Args:
        module: the layer; `module.is_causal` decides where is_causal is None (default True, as transformers has it).
        query: (batch, heads, q_len, head_dim), read through strides.
        key: (batch, kv_heads, k_len, head_dim); value: (batch, kv_heads, k_len, v_dim).
        attention_mask: None; a table or a boolean matrix of `transformers_masks`; (batch, k_len), 0 for padding; or
            (batch or 1, heads or 1, q_len, k_len), boolean or added to the scores. With four dimensions it is the whole
            mask, causality and window included; otherwise these apply, aligned bottom-right.
        dropout, scaling, softcap: as in `flashtile.attention`; scaling defaults to 1 / sqrt(head_dim).
        sliding_window: keys that a row sees, its own included; on both sides where the layer is not causal.
        s_aux: (heads,), sinks. position_bias: added to the scores, with its gradient.
        deterministic: as in `flashtile.attention`.
        cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k: batch 1 holds sequences end to end; so it does where
            position_ids, among the other arguments, start anew at 0, unless a matrix is the mask.

    Returns:
        (out, None): (batch, q_len, heads, v_dim); the weights are never formed.

    Raises:
        TypeError, ValueError: a bad argument. NotImplementedError: an argument that flashtile cannot honour.

    Source: transformers.integrations.sdpa_attention and flash_attention.
    """
    _refuse_what_is_unknown(kwargs)
    if query.shape[0] != key.shape[0]:
        query, key, value = _one_batch(query, key, value)
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    whole = attention_mask is not None and attention_mask.ndim == 4
    mask = None if whole else _band(causal, sliding_window)
    bounds = None
    if attention_mask is not None and is_table(attention_mask):
        bounds, attention_mask = from_table(attention_mask), None
    features: dict[str, Any] = {"sinks": s_aux, "softcap": softcap or 0.0, "dropout_p": dropout}
    try:
        if cu_seq_lens_q is not None:
            _check_packed(attention_mask, position_bias, query)
            offsets = _offsets(cu_seq_lens_q, cu_seq_lens_k)
            if bounds is None:
                call = _packed_call(query, key, value, offsets, (max_length_q, max_length_k), features)
                return _attend(prepare(call, mask, scaling, deterministic)).unsqueeze(0), None
            bounds = intersection(bounds, from_offsets(query.shape[2], *offsets))
        else:
            sequences = from_positions(kwargs.get("position_ids"), query.shape[2], key.shape[2])
            if sequences is not None and (not whole or bounds is not None):
                bounds = bounds or band_bounds(mask, query.shape[2], key.shape[2], query.device)
                mask, bounds = None, intersection(bounds, sequences)
        bias = _bias(attention_mask, position_bias)
        call = Call(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), bias, **features)
        return _attend(prepare(call, mask, scaling, deterministic), bounds), None
    except (TypeError, ValueError) as error:
        raise renamed(error, _NAMES) from None


def _refuse_what_is_unknown(kwargs: dict[str, Any]) -> None:
    for name, value in kwargs.items():
        if value is None or value is False or name in _ABOUT_OTHER_THINGS:
            continue
        if name == "output_attentions":
            raise NotImplementedError(
                "output_attentions: got True, but flashtile never forms the attention weights; "
                "use attn_implementation='eager' to look at them"
            )
        if name == "cache":
            raise NotImplementedError(
                "cache: got a paged cache of continuous batching, which attn_implementation='flashtile' does not "
                "read; use 'sdpa' for generate_batch"
            )
        raise NotImplementedError(
            f"{name}: got {type(value).__name__}, an argument that attn_implementation='flashtile' does not know and "
            "will not ignore; use 'eager' or 'sdpa' for this model"
        )


def _one_batch(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Learned queries may have a batch of one."""
    batch = max(t.shape[0] for t in tensors)
    return tuple(t.expand(batch, -1, -1, -1) if t.shape[0] == 1 else t for t in tensors)


_CAUSAL = masks.Causal()


def _band(causal: bool, sliding_window: int | None) -> masks.Mask | None:
    if sliding_window is None:
        return _CAUSAL if causal else None
    return masks.Window(sliding_window - 1, 0 if causal else sliding_window - 1)


def _bias(attention_mask: Tensor | None, position_bias: Tensor | None) -> Tensor | None:
    """What is added to the scores, or the boolean of what is seen."""
    if attention_mask is not None and attention_mask.ndim == 2:
        attention_mask = attention_mask.bool()[:, None, None, :]
    elif attention_mask is not None and not (attention_mask.dtype == torch.bool or attention_mask.is_floating_point()):
        raise TypeError(
            f"attention_mask: got {attention_mask.dtype} with shape {tuple(attention_mask.shape)}, expected bool "
            "(True is seen), a floating-point dtype (added to the scores), two dimensions, or flashtile's own table"
        )
    if position_bias is None:
        return attention_mask
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return torch.where(attention_mask, position_bias, -torch.inf)
    return position_bias + attention_mask


def _attend(call: Call, bounds: Bounds | None = None) -> Tensor:
    if bounds is not None:
        call = call._replace(lo=bounds[0], hi=bounds[1])
    return ops.attention(call)[0]


def _check_packed(attention_mask: Tensor | None, position_bias: Tensor | None, query: Tensor) -> None:
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_q: got sequences packed in a batch of {query.shape[0]}, expected a batch of 1")
    for name, value in (("attention_mask", attention_mask), ("position_bias", position_bias)):
        if value is not None:
            raise NotImplementedError(
                f"{name}: got one beside cu_seq_lens_q, but flashtile reads packed sequences without matrices over "
                "all of them; leave one of the two away"
            )


def _offsets(cu_seq_lens_q: Tensor, cu_seq_lens_k: Tensor | None) -> tuple[Tensor, Tensor]:
    if cu_seq_lens_q.dtype != torch.int32:
        cu_seq_lens_q = cu_seq_lens_q.to(torch.int32)
    if cu_seq_lens_k is not None and cu_seq_lens_k.dtype != torch.int32:
        cu_seq_lens_k = cu_seq_lens_k.to(torch.int32)
    return cu_seq_lens_q, cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k


def _packed_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int | Tensor | None, int | Tensor | None],
    features: dict[str, Any],
) -> Call:
    """Sequences end to end in a batch of one, for the kernels that know them."""
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    max_q, max_k = (int(n) if isinstance(n, Tensor) else n for n in longest)
    max_q, max_k = q.shape[0] if max_q is None else max_q, k.shape[0] if max_k is None else max_k
    return Call(
        q,
        k,
        v,
        cu_seqlens_q=offsets[0],
        cu_seqlens_k=offsets[1],
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        **features,
    )
