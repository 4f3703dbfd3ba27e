"""flash_attn_2_cuda, the compiled module of flash_attn 2, served by flashtile."""

from flashtile.integrations.flash_attn.raw import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]

SERVED_BY_FLASHTILE = True
