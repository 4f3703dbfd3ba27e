"""What each rank of a two-process run does; tests/test_distributed.py starts it as `ranks.py WAY RANK STORE`.

A small Transformer layer sees one half of a batch on each rank. Its gradients, averaged by DDP or FSDP, must be those
that a single process computes from the whole batch.
"""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import flashtile

PATIENCE = timedelta(seconds=90)
RANKS, BATCH, LENGTH, HEADS, DIM = 2, 4, 12, 4, 8


class Layer(nn.Module):
    """Attention with grouped heads, a learned bias and learned sinks, then a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * DIM, (HEADS + 2 * 2) * DIM)
        self.out = nn.Linear(HEADS * DIM, HEADS * DIM)
        self.bias = nn.Parameter(torch.randn(HEADS, LENGTH, LENGTH))
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, DIM)).split((HEADS, 2, 2), -2)
        attended = flashtile.attention(q, k, v, causal=True, bias=self.bias, sinks=self.sinks)
        return x + self.out(attended.flatten(-2))


class Model(nn.Module):
    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
        return x


def distributed(way: str, model: Model) -> nn.Module:
    if way.startswith("ddp"):
        return DistributedDataParallel(model)
    mesh = dist.init_device_mesh("cpu", (RANKS,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def full(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(way: str, rank: int) -> int:
    """How many gradients of this rank are those of a single process; raises AssertionError where one is not."""
    torch.manual_seed(3)
    single = Model(recompute=False)
    parallel = Model(recompute=way.endswith("checkpointed"))
    parallel.load_state_dict(single.state_dict())
    x = torch.randn(BATCH, LENGTH, HEADS * DIM)

    single(x).square().mean().backward()
    expected = {name: full(parameter.grad) for name, parameter in single.named_parameters()}

    wrapped = distributed(way, parallel)
    half = 0 if way.endswith("same-half") else rank
    wrapped(x.chunk(RANKS)[half]).square().mean().backward()
    for name, parameter in parallel.named_parameters():
        torch.testing.assert_close(full(parameter.grad), expected[name])
    return len(expected)


def main(way: str, rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=PATIENCE)
    # DDP's reducer has to be gone before the process group is: the last owner of a group waits for its threads, a
    # reducer does so with the interpreter's lock in hand, and one of these threads may still want that lock.
    print(f"{compare(way, rank)} gradients agree")
    dist.barrier()  # a rank that leaves early takes its connections away from one that still reduces
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
