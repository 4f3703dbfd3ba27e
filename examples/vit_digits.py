"""Trains a small vision transformer on scikit-learn's digits, with standard attention and with flashtile.

The model calls torch.nn.functional.scaled_dot_product_attention; `flashtile.replace_sdpa()` puts flashtile in its place
without a change of the model. Standard attention writes out the whole matrix of weights. Both learn the same batches
from the same weights and must come to the same accuracy.

    pip install flashtile scikit-learn
    python examples/vit_digits.py                 # about a minute on two CPU cores
    python examples/vit_digits.py --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import time

import sklearn.datasets
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashtile

PATCH = 2  # 8 x 8 images in 16 patches


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class StandardAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2))
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, attention: type[Attention], width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class VisionTransformer(nn.Module):
    """Patches, positions, a token for the class, blocks, one linear layer (Dosovitskiy et al. 2020)."""

    def __init__(self, attention: type[Attention], width: int = 64, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, PATCH)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(Block(attention, width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(images.shape[0], -1, -1), patches], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


def digits() -> tuple[Tensor, Tensor]:
    """(images in 0 to 1, labels), in a fixed random order."""
    data = sklearn.datasets.load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    return images, torch.tensor(data.target)[order]


def train(model: VisionTransformer, images: Tensor, labels: Tensor, epochs: int, dtype: torch.dtype) -> float:
    """Seconds of training."""
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    size = 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * (len(images) // size))
    batches, start = torch.Generator().manual_seed(1), time.perf_counter()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=batches).to(images.device)
        for step in range(len(images) // size):
            batch = order[step * size : (step + 1) * size]
            with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(model(images[batch]).float(), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    loss.item()  # waits for a GPU
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: VisionTransformer, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(-1) == labels).float().mean())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args(arguments)
    images, labels = (t.to(options.device) for t in digits())
    held_out = len(images) // 4
    found = []
    for name, attention in (("standard attention", StandardAttention), ("flashtile", Attention)):
        torch.manual_seed(0)
        model = VisionTransformer(attention).to(options.device)
        replacement = flashtile.replace_sdpa() if attention is Attention else None
        seconds = train(model, images[held_out:], labels[held_out:], options.epochs, getattr(torch, options.dtype))
        found.append(accuracy(model, images[:held_out], labels[:held_out]))
        print(f"{name:18} accuracy {found[-1]:.3f} on {held_out} held-out images, trained in {seconds:.1f} s")
        if replacement is not None:
            replacement.restore()
            print(f"{replacement.served} calls on flashtile, passed on to PyTorch: {replacement.passed_on or 'none'}")
            if not replacement.served or replacement.passed_on:
                return 1
    # Two standard errors of an accuracy, and one image: rounding alone may turn that many.
    allowed = 2 * (found[0] * (1 - found[0]) / held_out) ** 0.5 + 1 / held_out
    equal = abs(found[0] - found[1]) <= allowed
    print("equal" if equal else "NOT EQUAL")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
