"""Modules on flashtile's attention, to put where PyTorch's stand."""

from flashtile.nn.multihead_attention import MultiheadAttention
from flashtile.nn.rotary import RotaryEmbedding

__all__ = ["MultiheadAttention", "RotaryEmbedding"]
