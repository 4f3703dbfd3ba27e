"""flash_attn.layers.rotary, served by flashtile."""

from flashtile.integrations.flash_attn.rotary import *  # noqa: F403
