"""flash_attn.ops.triton: the module rotary is served by flashtile."""
