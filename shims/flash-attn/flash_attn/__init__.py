"""flash_attn 2.8 as flashtile serves it; submodules lie in flashtile, others beside (flash_attn.cute) stay in reach."""

from pkgutil import extend_path

from flashtile.integrations.flash_attn import FOLDER
from flashtile.integrations.flash_attn import VERSION as __version__  # noqa: N811

__path__ = list(dict.fromkeys([str(FOLDER / "flash_attn"), *extend_path(__path__, __name__)]))

from flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

SERVED_BY_FLASHTILE = True
