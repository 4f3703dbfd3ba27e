"""Image models through replace_sdpa: blocks as UNets and DiTs have them, models of diffusers, timm's transformer."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import close, gradients
from torch import Tensor, nn

import flashtile


class UNetBlock(nn.Module):
    """The attention of a UNet: every place of a feature map looks at all others, and then at a text."""

    def __init__(self, channels: int = 16, heads: int = 2, text: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(4, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.to_q, self.to_kv = nn.Linear(channels, channels), nn.Linear(text, 2 * channels)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3 * self.heads, -1)).transpose(2, 3).chunk(3, 1)
        own = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:])
        x = x + self.out(own)
        q = self.to_q(x.flatten(2).transpose(1, 2)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(text).unflatten(-1, (2 * self.heads, -1)).transpose(1, 2).chunk(2, 1)
        crossed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + crossed.transpose(1, 2).unflatten(2, x.shape[2:])


class DiTBlock(nn.Module):
    """A diffusion transformer's block: attention over patches, modulated by the time step (Peebles & Xie 2022)."""

    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 3 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(F.silu(time))[:, None].chunk(3, -1)
        q, k, v = self.qkv(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).unbind(2)
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        return x + gate * self.out(out.transpose(1, 2).flatten(2))


def check(
    model: nn.Module, inputs: tuple[Any, ...], calls: int, read: Callable[[Any], Tensor] = lambda out: out
) -> None:
    """The same output and gradients with flashtile in the place of PyTorch's attention, and that many calls of it."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    leaves = [p for p in model.parameters() if p.requires_grad]
    leaves += [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    want = read(model(*inputs))
    with flashtile.replace_sdpa() as replacement:
        out = read(model(*inputs))
    assert (replacement.served, replacement.passed_on) == (calls, {})
    close(out, want)
    dout = torch.randn_like(want)
    close(gradients((out,), leaves, [dout]), gradients((want,), leaves, [dout]))


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_unet_block() -> None:
    check(UNetBlock().double(), (leaf(2, 16, 5, 6), leaf(2, 7, 12)), 2)


def test_dit_block() -> None:
    check(DiTBlock().double(), (leaf(2, 9, 16), leaf(2, 16)), 1)


def test_diffusers_unet() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn", cross_attention_dim=12, attention_head_dim=2, norm_num_groups=4,
    )  # fmt: skip
    inputs = (leaf(2, 4, 8, 8), torch.tensor([3, 5]), leaf(2, 7, 12))
    # One block down, one in the middle, two up; each looks at the image, then at the text.
    check(model.double(), inputs, 8, lambda out: out.sample)


def test_diffusers_dit() -> None:
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_num_groups=4,
    )  # fmt: skip
    model = model.double().eval()
    check(model, (leaf(2, 4, 8, 8), torch.tensor([3, 5]), torch.tensor([1, 2])), 2, lambda out: out.sample)


def test_timm_vision_transformer() -> None:
    """timm asks for torchvision, which has to fit the installed torch."""
    try:
        timm = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm cannot be imported: {error}")
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    check(model.double().eval(), (leaf(2, 3, 32, 32),), 2)
