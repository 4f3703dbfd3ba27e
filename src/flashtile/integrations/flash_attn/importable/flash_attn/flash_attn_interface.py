"""flash_attn.flash_attn_interface, served by flashtile."""

from flashtile.integrations.flash_attn.interface import *  # noqa: F403
