"""flash_attn.ops.triton.rotary, served by flashtile."""

from flashtile.integrations.flash_attn.rotary import apply_rotary

__all__ = ["apply_rotary"]
