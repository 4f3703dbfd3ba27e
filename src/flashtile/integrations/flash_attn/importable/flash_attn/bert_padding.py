"""flash_attn.bert_padding, served by flashtile."""

from flashtile.integrations.flash_attn.bert_padding import *  # noqa: F403
from flashtile.integrations.flash_attn.bert_padding import __getattr__  # noqa: F401 - einops' functions on demand
