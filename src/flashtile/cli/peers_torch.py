"""PyTorch's own attention as peers of `bench`: scaled_dot_product_attention, FlexAttention, varlen_attn."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashtile.cli.peers import Prepared, Setting, alibi_bias, as_heads_first, leaves_of, too_large, visible
from flashtile.cli.workload import Inputs, Workload

HALF = (torch.float16, torch.bfloat16)


class Sdpa:
    """torch.nn.functional.scaled_dot_product_attention, left to its own choice or held to one of its backends."""

    drops_alike = False

    def __init__(self, backend: str | None = None) -> None:
        self.name = "sdpa" if backend is None else f"sdpa-{backend}"
        kinds = {
            "flash": SDPBackend.FLASH_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "math": SDPBackend.MATH,
        }
        self.kind = None if backend is None else kinds[backend]

    def refuses(self, work: Workload, setting: Setting) -> str | None:
        if setting.device != "cuda" and self.kind in (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            return "runs on CUDA devices only"
        for has, what in ((work.lengths, "packed sequences"), (work.softcap, "softcap"), (work.sinks, "sinks")):
            if has:
                return f"has no {what}"
        if self.kind == SDPBackend.FLASH_ATTENTION and work.v_dim != work.qk_dim:
            return "has one head dim for q, k and v"
        learns = work.bias_grad and setting.backward
        if self.kind in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION) and learns:
            # The CPU's flash kernel takes a mask but returns no gradient for it.
            return "has no gradient of the bias"
        if self.kind == SDPBackend.MATH:
            return too_large(work, setting, 7 if setting.backward else 4)
        masks_held = 0 if _causal_flag(work) or _no_mask(work) else 2
        return too_large(work, setting, masks_held)

    def prepare(self, work: Workload, inputs: Inputs, backward: bool) -> Prepared:
        leaves = leaves_of(work, inputs, backward, heads_first=True)
        flag = _causal_flag(work)
        seen = None if flag else visible(work, inputs.q.device)
        alibi = None if inputs.slopes is None else alibi_bias(work, inputs)
        bias = leaves.get("bias", inputs.bias)
        # What has no gradient is added up once; a learned bias has to be masked in each call.
        fixed = alibi
        if fixed is not None and seen is not None:
            fixed = fixed.masked_fill(~seen, -torch.inf)

        def attn_mask() -> Tensor | None:
            if bias is None:
                return seen if fixed is None else fixed
            added = bias if fixed is None else bias + fixed
            added = added if seen is None else added.masked_fill(~seen, -torch.inf)
            return added.expand(work.batch, -1, -1, -1)

        def call() -> Tensor:
            return F.scaled_dot_product_attention(
                leaves["q"],
                leaves["k"],
                leaves["v"],
                attn_mask(),
                dropout_p=work.dropout_p,
                is_causal=flag,
                scale=work.scale,
                enable_gqa=work.group > 1,
            )

        def context() -> AbstractContextManager[object]:
            return nullcontext() if self.kind is None else sdpa_kernel(self.kind)

        held = sum(t.nbytes for t in (seen, fixed) if t is not None)
        return Prepared(call, leaves, as_heads_first(work, inputs.dout), True, held, context)


def _no_mask(work: Workload) -> bool:
    return not work.causal and work.plain_mask and not work.alibi and work.bias is None


def _causal_flag(work: Workload) -> bool:
    """PyTorch's is_causal: aligned to the first key, and not to be given together with a mask."""
    return work.causal and work.plain_mask and not work.alibi and work.bias is None


class Flex:
    """FlexAttention, compiled; masks as a BlockMask, score changes as a score_mod."""

    name = "flex"
    drops_alike = False

    def refuses(self, work: Workload, setting: Setting) -> str | None:
        if work.dropout_p > 0:
            return "has no dropout"
        if setting.device not in ("cuda", "cpu", "xpu"):
            return f"is not available on {setting.device}"
        if setting.device == "cpu" and setting.backward:
            return "has no backward on the CPU"
        if setting.device == "cpu" and work.sinks:
            return "returns no lse on the CPU, which sinks need"
        return None

    def prepare(self, work: Workload, inputs: Inputs, backward: bool) -> Prepared:
        from torch.nn.attention.flex_attention import flex_attention

        # A new shape is a new compilation; old ones would only count against the recompile limit.
        torch._dynamo.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        leaves = leaves_of(work, inputs, backward, heads_first=True)
        keywords: dict[str, Any] = {
            "score_mod": _score_mod(work, inputs, leaves.get("bias", inputs.bias)),
            "block_mask": _block_mask(work, inputs.q.device),
            "scale": work.softmax_scale,
            "enable_gqa": work.group > 1,
        }
        q, k, v = leaves["q"], leaves["k"], leaves["v"]

        def plain() -> Tensor:
            return compiled(q, k, v, **keywords)

        def with_sinks() -> Tensor:
            out, lse = _with_lse(compiled, q, k, v, keywords)
            kept = torch.sigmoid(lse - leaves["sinks"].float()[:, None])[..., None]
            return (out * kept).to(out.dtype)

        call = with_sinks if work.sinks else plain
        return Prepared(call, leaves, as_heads_first(work, inputs.dout), heads_first=True)


def _with_lse(compiled: Any, q: Tensor, k: Tensor, v: Tensor, keywords: dict[str, Any]) -> tuple[Tensor, Tensor]:
    from torch.nn.attention import flex_attention

    if hasattr(flex_attention, "AuxRequest"):
        out, auxiliary = compiled(q, k, v, return_aux=flex_attention.AuxRequest(lse=True), **keywords)
        return out, auxiliary.lse
    return compiled(q, k, v, return_lse=True, **keywords)


def _score_mod(work: Workload, inputs: Inputs, bias: Tensor | None) -> Callable[..., Tensor] | None:
    if not (work.softcap or work.alibi or bias is not None):
        return None
    softcap, slopes, offset = work.softcap, inputs.slopes, work.k_len - work.q_len
    shared = bias is not None and bias.shape[0] == 1

    def score_mod(score: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if softcap > 0:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[h] * (row + offset - key).abs()
        if bias is not None:
            score = score + (bias[0, h, row, key] if shared else bias[b, h, row, key])
        return score

    return score_mod


def _block_mask(work: Workload, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if work.mask() is None and work.padding is None and work.lengths is None:
        return None
    left, right = (work.mask().distances() if work.mask() is not None else None) or (None, None)  # type: ignore[union-attr]
    packed = work.lengths is not None
    q_len, k_len = (work.total, work.total) if packed else (work.q_len, work.k_len)
    offset = k_len - q_len
    document = torch.repeat_interleave(torch.tensor(work.lengths)).to(device) if packed else None
    ends = None if work.padding is None else torch.tensor(work.padding, device=device)

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        seen = key >= 0
        if left is not None:
            seen = seen & (key >= row + offset - left)
        if right is not None:
            seen = seen & (key <= row + offset + right)
        if document is not None:
            seen = seen & (document[row] == document[key])
        if ends is not None:
            seen = seen & (key < ends[b])
        return seen

    batch = None if ends is None else work.batch
    return create_block_mask(mask_mod, batch, None, q_len, k_len, device=device.type)


class TorchVarlen:
    """torch.nn.attention.varlen.varlen_attn, for packed sequences."""

    name = "torch-varlen"
    drops_alike = False

    def refuses(self, work: Workload, setting: Setting) -> str | None:
        if work.lengths is None:
            return "is for packed sequences only"
        if setting.device != "cuda" or setting.dtype not in HALF:
            return "runs on CUDA devices in half precision only"
        for has, what in ((work.softcap, "softcap"), (work.sinks, "sinks"), (work.alibi, "ALiBi"), (work.bias, "bias")):
            if has:
                return f"has no {what}"
        if work.dropout_p > 0:
            return "has no dropout"
        if work.window is not None and "window_size" not in _varlen_parameters():
            return "has no window in this version of PyTorch"
        return None

    def prepare(self, work: Workload, inputs: Inputs, backward: bool) -> Prepared:
        from torch.nn.attention.varlen import varlen_attn

        leaves = leaves_of(work, inputs, backward, heads_first=False)
        known = _varlen_parameters()
        left, right = _sides(work)
        keywords: dict[str, Any] = {"scale": work.scale}
        if "window_size" in known:
            keywords["window_size"] = (left, right)
        else:
            keywords["is_causal"] = work.causal
        if "enable_gqa" in known:
            keywords["enable_gqa"] = work.group > 1
        ends = inputs.cu_seqlens
        assert ends is not None

        def call() -> Tensor:
            packed = (ends, ends, work.q_len, work.k_len)
            out = varlen_attn(leaves["q"], leaves["k"], leaves["v"], *packed, **keywords)
            assert isinstance(out, Tensor)
            return out

        return Prepared(call, leaves, inputs.dout)


def _varlen_parameters() -> set[str]:
    from torch.nn.attention.varlen import varlen_attn

    return set(inspect.signature(varlen_attn).parameters)


def _sides(work: Workload) -> tuple[int, int]:
    """(left, right) keys around the diagonal, -1 for unlimited."""
    mask = work.mask()
    left, right = (mask.distances() if mask is not None else None) or (None, None)
    return -1 if left is None else left, -1 if right is None else right
