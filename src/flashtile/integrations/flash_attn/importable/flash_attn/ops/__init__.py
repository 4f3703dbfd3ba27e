"""flash_attn.ops: the module triton.rotary is served by flashtile."""
