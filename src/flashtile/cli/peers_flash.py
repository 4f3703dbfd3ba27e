"""The packages flash_attn, flash_attn_interface and flash_attn.cute, FlashAttention 2, 3 and 4, as peers of `bench`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flashtile.cli.peers import Prepared, Setting, leaves_of
from flashtile.cli.workload import Inputs, Workload

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Flash:
    """One of the packages. lacks: features of a workload that its call has no argument for, with their names."""

    name: str
    module: str
    lacks: dict[str, str]
    unlimited: int | None = -1  # how its window_size says "no limit"
    features: Callable[[Workload, Inputs, dict[str, Tensor]], dict[str, Any]] = field(default=lambda *_: {})
    drops_alike: bool = False

    def missing(self) -> str | None:
        """None where the package can be imported, else why not."""
        try:
            self._load()
        except ImportError as error:
            return f"{self.module} cannot be imported: {error}"
        return None

    def refuses(self, work: Workload, setting: Setting) -> str | None:
        reason = self.missing()
        if reason is not None:
            return reason
        if setting.device != "cuda" or setting.dtype not in HALF:
            return "runs on CUDA devices in half precision only"
        for attribute, what in self.lacks.items():
            if getattr(work, attribute):
                return f"has no {what}"
        if work.v_dim != work.qk_dim and self.name == "flash2":
            return "has one head dim for q, k and v"
        return None

    def prepare(self, work: Workload, inputs: Inputs, backward: bool) -> Prepared:
        module = self._load()
        leaves = leaves_of(work, inputs, backward, heads_first=False)
        q, k, v = leaves["q"], leaves["k"], leaves["v"]
        left, right = work.window or (None, None)
        keywords = {
            "softmax_scale": work.scale,
            "causal": work.causal,
            "window_size": tuple(self.unlimited if side is None else side for side in (left, right)),
            **self.features(work, inputs, leaves),
        }

        def dense() -> Tensor:
            return _out(module.flash_attn_func(q, k, v, **keywords))

        def packed() -> Tensor:
            ends = inputs.cu_seqlens
            return _out(
                module.flash_attn_varlen_func(
                    q,
                    k,
                    v,
                    cu_seqlens_q=ends,
                    cu_seqlens_k=ends,
                    max_seqlen_q=work.q_len,
                    max_seqlen_k=work.k_len,
                    **keywords,
                )
            )

        return Prepared(dense if inputs.cu_seqlens is None else packed, leaves, inputs.dout)

    def _load(self) -> ModuleType:
        module = import_module(self.module)
        if not hasattr(module, "flash_attn_func"):  # the namespace that FlashAttention 4 shares with 2
            raise ImportError(f"{self.module} has no flash_attn_func")
        if getattr(module, "SERVED_BY_FLASHTILE", False):
            raise ImportError(f"{self.module} is flashtile itself, by install() or the distribution in shims/")
        return module


def _out(result: Any) -> Tensor:
    """Some versions return (out, lse)."""
    return result[0] if isinstance(result, tuple) else result


NO_PADDING = {"padding": "padding other than packed sequences"}

FLASH_2 = Flash(
    "flash2",
    "flash_attn",
    lacks={"bias": "bias", "sinks": "sinks", **NO_PADDING},
    features=lambda work, inputs, leaves: {
        "softcap": work.softcap,
        "alibi_slopes": inputs.slopes,
        "dropout_p": work.dropout_p,
    },
)
FLASH_3 = Flash(
    "flash3",
    "flash_attn_interface",
    lacks={"bias": "bias", "sinks": "sinks", "alibi": "ALiBi", "dropout_p": "dropout", **NO_PADDING},
    features=lambda work, inputs, leaves: {"softcap": work.softcap},
)
FLASH_4 = Flash(
    "flash4",
    "flash_attn.cute",
    lacks={"bias": "bias in its own arguments", "alibi": "ALiBi", "dropout_p": "dropout", **NO_PADDING},
    unlimited=None,
    features=lambda work, inputs, leaves: {"softcap": work.softcap, "learnable_sink": leaves.get("sinks")},
)
