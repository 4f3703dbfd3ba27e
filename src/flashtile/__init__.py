"""flashtile: exact, IO-aware attention for training and serving Transformers."""

from flashtile import masks, nn
from flashtile.api import attention, attention_varlen
from flashtile.dispatch import check_device_errors, use_backend
from flashtile.integrations import aten_flash as _aten_flash
from flashtile.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flashtile.integrations.replace_sdpa import replace_sdpa
from flashtile.integrations.sdpa import scaled_dot_product_attention
from flashtile.merge import merge_states

_aten_flash.register()

__version__ = "0.1.0"

__all__ = [
    "attention",
    "attention_varlen",
    "check_device_errors",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "masks",
    "merge_states",
    "nn",
    "replace_sdpa",
    "scaled_dot_product_attention",
    "use_backend",
]
