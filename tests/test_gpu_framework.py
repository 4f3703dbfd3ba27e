"""What only a GPU can show of flashtile inside PyTorch: graphs, streams, devices, no waiting for the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile

pytestmark = [
    pytest.mark.gpu,
    # PyTorch's words about its own tools: compiling, "reduce-overhead" beginning with an empty graph, capturing on a
    # side stream what was made on another, the check for synchronisation.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        "ignore:The CUDA Graph is empty:UserWarning",
        "ignore:The AccumulateGrad node's stream:UserWarning",
        "ignore:Synchronization debug mode is a prototype:UserWarning",
    ),
]


def inputs(length: int = 256, device: str = "cuda") -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, length, 8, 64), (2, length, 2, 64), (2, length, 2, 64))
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16).requires_grad_() for shape in shapes)
    return q, k, v


@functools.cache
def offsets_on_the_gpu() -> Tensor:
    return torch.tensor([0, 100, 100, 512], dtype=torch.int32, device="cuda")


def varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """The same tensors as sequences of 100, 0 and 412 packed end to end."""
    offsets = offsets_on_the_gpu()
    return flashtile.attention_varlen(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), offsets, None, 412, 412, **options
    )


CALLS: dict[str, Callable[..., Tensor]] = {
    "causal": lambda *qkv: flashtile.attention(*qkv, causal=True),
    "table": lambda *qkv: flashtile.attention(*qkv, mask=flashtile.masks.Chunked(64)),
    "deterministic": lambda *qkv: flashtile.attention(*qkv, deterministic=True),
    "bias": lambda *qkv: flashtile.attention(*qkv, bias=torch.ones(256, 256, device="cuda", dtype=torch.bfloat16)),
}


def gradients(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_cuda_graph_of_forward_and_backward(call: Callable[..., Tensor]) -> None:
    static, fresh = inputs(), inputs()
    graphed = torch.cuda.make_graphed_callables(lambda *qkv: call(*qkv), static)
    results = gradients(graphed, *fresh)
    for got, expected in zip(results, gradients(call, *fresh), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


def test_cuda_graph_of_packed_sequences() -> None:
    q, k, v = (t.detach() for t in inputs())
    offsets = torch.tensor([0, 100, 100, 512], dtype=torch.int32, device="cuda")
    tensors = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))

    def attend() -> Tensor:
        return flashtile.attention_varlen(*tensors, offsets, None, 512, 512, causal=True)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    offsets.copy_(torch.tensor([0, 30, 300, 512], dtype=torch.int32))
    graph.replay()
    assert torch.equal(out, attend())


def test_each_replay_draws_a_new_dropout_mask() -> None:
    q, k, v = (t.detach() for t in inputs())
    flashtile.attention(q, k, v, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashtile.attention(q, k, v, dropout_p=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(out, first)


def test_dropout_is_the_same_in_a_graphs_forward_and_backward() -> None:
    """The output is linear in v: with the same elements dropped, <dout, out(v)> = <dv, v>."""
    q, k, v = inputs()
    graphed = torch.cuda.make_graphed_callables(lambda *qkv: flashtile.attention(*qkv, dropout_p=0.5), (q, k, v))
    for _ in range(2):
        out = graphed(q, k, v)
        dout = torch.ones_like(out)
        (dv,) = torch.autograd.grad(out, v, dout)
        torch.testing.assert_close((dv.double() * v).sum(), out.double().sum(), rtol=1e-2, atol=1.0)


def test_work_goes_to_the_current_stream() -> None:
    """The inputs are written on a side stream behind a long wait: any other stream reads them too early."""
    q, k, v = (t.detach() for t in inputs())
    expected = flashtile.attention(q, k, v)
    late = [torch.full_like(t, torch.nan) for t in (q, k, v)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for empty, tensor in zip(late, (q, k, v), strict=True):
            empty.copy_(tensor)
        out = flashtile.attention(*late)
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_work_goes_to_the_inputs_device() -> None:
    q, k, v = inputs(device="cuda:1")
    assert torch.cuda.current_device() == 0
    results = gradients(CALLS["causal"], q, k, v)
    assert all(t.device.index == 1 for t in results)
    elsewhere = [t.detach().to("cuda:0").requires_grad_() for t in (q, k, v)]
    for got, expected in zip(results, gradients(CALLS["causal"], *elsewhere), strict=True):
        torch.testing.assert_close(got.to("cuda:0"), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("call", [*CALLS.values(), varlen], ids=[*CALLS, "varlen"])
def test_no_call_waits_for_the_device(call: Callable[..., Tensor]) -> None:
    leaves = inputs()
    gradients(call, *leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(call, *leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_wait_would_be_noticed() -> None:
    tensor = torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            tensor.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_inductor(mode: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(CALLS["causal"], fullgraph=True, mode=mode)
    for _ in range(3):
        leaves = inputs()
        for got, expected in zip(gradients(compiled, *leaves), gradients(CALLS["causal"], *leaves), strict=True):
            torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)


def test_deterministic_algorithms_repeat_bitwise() -> None:
    torch.use_deterministic_algorithms(True)
    leaves = inputs(1000)
    first, second = gradients(CALLS["causal"], *leaves), gradients(CALLS["causal"], *leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_uses_the_gpus_dtype() -> None:
    q, k, v = (t.detach().float() for t in inputs())
    with torch.autocast("cuda"):
        out = flashtile.attention(q, k, v)
    assert out.dtype == torch.float16
