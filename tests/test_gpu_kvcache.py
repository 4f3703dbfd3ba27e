"""What only a GPU can show of the key-value cache: no waiting for the device, graphs, reports of bad contents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cached import KINDS, Setting, expected
from torch import Tensor

import flashtile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]


def on_the_gpu(name: str) -> tuple[dict[str, Any], Tensor]:
    """The arguments of a kind of call, and the result that they must give."""
    setting = Setting(KINDS[name], torch.float32)
    out, _, _ = expected(setting)
    arguments = {n: v.cuda() if isinstance(v, Tensor) and v.ndim else v for n, v in setting.arguments().items()}
    return arguments, out.float().cuda()


@pytest.mark.parametrize("name", ["append-1", "append-heads-first-memory", "append-pages", "rotary-rows"])
def test_no_call_waits_for_the_device(name: str) -> None:
    arguments, out = on_the_gpu(name)
    flashtile.flash_attn_with_kvcache(**arguments)  # compiles, and makes what is made once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = flashtile.flash_attn_with_kvcache(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result, out)


@pytest.mark.parametrize("pages", [False, True])
def test_a_graph_decodes_token_by_token(pages: bool) -> None:
    steps, batch = 4, 3
    shape = (batch * 2, 8, 2, 64) if pages else (batch, 16, 2, 64)
    table = torch.randperm(batch * 2, device="cuda", dtype=torch.int32).view(batch, 2) if pages else None
    caches = torch.zeros(2, *shape, device="cuda", dtype=torch.float16)
    tokens = [torch.randn(steps, batch, 1, heads, 64, device="cuda", dtype=torch.float16) for heads in (4, 2, 2)]
    held = torch.tensor([5, 0, 9], device="cuda", dtype=torch.int32)
    q, k, v = (t[0].clone() for t in tokens)

    def step() -> Tensor:
        result = flashtile.flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=held, block_table=table, causal=True)
        held.add_(1)
        assert isinstance(result, Tensor)
        return result

    def run(advance: Any) -> list[Tensor]:
        caches.zero_()
        held.copy_(torch.tensor([5, 0, 9]))
        outs = []
        for index in range(steps):
            for place, token in zip((q, k, v), tokens, strict=True):
                place.copy_(token[index])
            outs.append(advance().clone())
        return outs

    eager = run(step)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    for ours, theirs in zip(run(replay), eager, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("append-1", {"cache_seqlens": [5, 0, 12]}, "cache_seqlens"),
        ("pages-of-4", {"cache_seqlens": [5, 0, 13]}, "cache_seqlens"),
        ("pages-of-4", {"block_table": [[0, 1, 2], [3, 4, 5], [6, 7, 99]]}, "block_table"),
        ("rows", {"cache_batch_idx": [0, 1, 4]}, "cache_batch_idx"),
    ],
)
def test_bad_contents_are_reported(name: str, changes: dict[str, Any], words: str) -> None:
    arguments, _ = on_the_gpu(name)
    good, out = on_the_gpu("plain")
    bad = {n: torch.tensor(v, dtype=torch.int32, device="cuda") for n, v in changes.items()}
    flashtile.flash_attn_with_kvcache(**{**arguments, **bad})
    with pytest.raises(ValueError, match=f"earlier flashtile call.*{words}"):
        flashtile.check_device_errors("cuda")
    torch.testing.assert_close(flashtile.flash_attn_with_kvcache(**good), out)
