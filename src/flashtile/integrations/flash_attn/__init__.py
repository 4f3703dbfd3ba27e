"""The package flash_attn 2.8, served by flashtile: its functions, and its modules under its own names.

    from flashtile.integrations import flash_attn

    flash_attn.flash_attn_func(q, k, v, causal=True)        # by name
    flash_attn.install()                                    # from here on `import flash_attn` is flashtile

`functions` and `kvcache` are the public calls, `raw` what flash_attn's compiled module offers, `interface`,
`bert_padding` and `rotary` its modules of these names; `importable/` holds what `install` puts on the import path.
docs/integrations/flash_attn.md is for users.
"""

from __future__ import annotations

from flashtile.integrations.flash_attn.functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flashtile.integrations.flash_attn.install import FOLDER, VERSION, install
from flashtile.integrations.flash_attn.kvcache import flash_attn_with_kvcache

__all__ = [
    "FOLDER",
    "VERSION",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "install",
]
