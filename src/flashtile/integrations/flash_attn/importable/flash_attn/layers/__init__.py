"""flash_attn.layers: the module rotary is served by flashtile."""
