"""Times one decoder layer of transformers' Llama, forward and backward, with flashtile and with PyTorch's SDPA.

    python benchmarks/llama_block.py --out benchmarks/results/h100-models.jsonl
    python benchmarks/llama_block.py --batch 4     # eager, with enough work that the GPU is what takes the time
    python benchmarks/llama_block.py --graph       # one sequence, replayed from a CUDA graph: the GPU's time alone

8 heads of 128, 4096 tokens, bfloat16 on a GPU; both attentions take turns, and the block's outputs are compared first.
Appends one JSON object per attention: milliseconds (median, 20 % and 80 % quantiles), device, versions, commit.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from transformers.models.llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from flashtile.cli import machine, timing
from flashtile.integrations import transformers as integration

ATTENTIONS = ("flashtile", "sdpa")
LAYOUT = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 2752}


def step(attention: str, device: str, batch: int, tokens: int) -> tuple[Callable[[], None], Callable[[], torch.Tensor]]:
    """(forward and backward of one layer, its forward alone), weights and input equal for every attention."""
    torch.manual_seed(0)
    config = LlamaConfig(**LAYOUT, attn_implementation=attention)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    layer = LlamaDecoderLayer(config, 0).to(device, dtype)
    hidden = torch.randn(batch, tokens, LAYOUT["hidden_size"], device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(hidden)
    positions = torch.arange(tokens, device=device)[None]
    rotary = LlamaRotaryEmbedding(config).to(device)(hidden, positions)

    def forward() -> torch.Tensor:
        out = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return out[0] if isinstance(out, tuple) else out

    def both() -> None:
        torch.autograd.grad(forward(), [hidden, *layer.parameters()], upstream)

    return both, forward


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """A replay of what `run` does on the GPU."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=machine.default_device())
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--graph", action="store_true", help="capture the step and time its replay")
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--out", help="append the rows to this file")
    chosen = parser.parse_args()
    integration.register()
    steps = {name: step(name, chosen.device, chosen.batch, chosen.tokens) for name in ATTENTIONS}
    with torch.no_grad():
        ours, theirs = (steps[name][1]().float() for name in ATTENTIONS)
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error < 1e-2:
        raise SystemExit(f"the block's output differs by {error:.1e} relative, expected below 1e-2")
    runs = [captured(both) if chosen.graph else both for both, _ in steps.values()]
    times = timing.device_times([timing.Plain(run) for run in runs], chosen.device, chosen.seconds)
    for name, measured in zip(ATTENTIONS, times, strict=True):
        median, low, high = timing.quantiles(measured)
        row = {
            "case": "llama-block", "attention": name, "mode": "train", "graph": chosen.graph, "batch": chosen.batch,
            "tokens": chosen.tokens, **LAYOUT,
            "ms": median, "ms_q20": low, "ms_q80": high, "difference": error,
            "device": machine.device_facts(chosen.device), "versions": machine.versions(),
            "commit": machine.commit(), "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        print(f"{name:10s} {median:8.3f} ms")
        if chosen.out:
            with open(chosen.out, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
