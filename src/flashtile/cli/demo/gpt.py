"""A small byte-level GPT: pre-norm blocks, rotary positions, tied embedding; its attention is an argument."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashtile.cli.demo.attentions import Attention
from flashtile.cli.demo.settings import Training

BYTES = 256
ROTARY_BASE = 10000.0


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, attend: Attention) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.unbind(2)
        out = self.attend(rotate(q, rotation), rotate(k, rotation), v)
        x = x + self.project(out.reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class GPT(nn.Module):
    """Maps bytes (batch, length), int64, to logits of the next byte (batch, length, 256).

    The parameters depend on the seed alone, not on the attention.
    """

    def __init__(self, size: Training, attend: Attention) -> None:
        super().__init__()
        self.head_dim = size.width // size.heads
        self.embed = nn.Embedding(BYTES, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads, attend) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        generator = torch.Generator().manual_seed(size.seed)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02, generator=generator)

    def forward(self, text: Tensor) -> Tensor:
        rotation = rotary_angles(text.shape[1], self.head_dim, text.device)
        x = self.embed(text)
        for block in self.blocks:
            x = block(x, rotation)
        return F.linear(self.norm(x), self.embed.weight)

    def loss(self, text: Tensor) -> Tensor:
        """Mean cross entropy in nats a byte; text is (batch, length + 1)."""
        logits = self(text[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())


def rotary_angles(length: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, (length, 1, dim / 2) (Su et al. 2021, "RoFormer", section 3.2.2)."""
    frequency = ROTARY_BASE ** -(torch.arange(0, dim, 2, device=device) / dim)
    angle = torch.outer(torch.arange(length, device=device), frequency)[:, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """x, (batch, length, heads, dim), turned by its positions."""
    cos, sin = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@torch.no_grad()
def write(model: GPT, start: bytes, count: int, context: int, device: str) -> bytes:
    """`count` bytes after `start`, drawn from the model one by one; the same for the same model on the same device."""
    generator = torch.Generator(device).manual_seed(0)
    text = torch.tensor([list(start)], device=device)
    for _ in range(count):
        logits = model(text[:, -context:])[:, -1].float()
        # A model whose training failed gives nan; what it writes is then as good as random.
        logits = logits.nan_to_num()
        drawn = torch.multinomial((logits / 0.7).softmax(-1), 1, generator=generator)
        text = torch.cat([text, drawn], 1)
    return bytes(text[0].tolist())
