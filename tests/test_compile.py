"""torch.compile(fullgraph=True): no graph break, the eager results, and no recompilation for each new length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from process import fresh_process
from torch import Tensor

import flashtile
from flashtile import masks


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


FIRST_CALL = """
import sys, torch, flashtile
assert "torch._dynamo" not in sys.modules
q, k, v = (torch.randn(2, 24, heads, 16, requires_grad=True) for heads in (4, 2, 2))
bias, sinks = torch.randn(24, 24, requires_grad=True), torch.randn(4, requires_grad=True)
leaves = (q, k, v, bias, sinks)

def step(q, k, v, bias, sinks):
    out, lse = flashtile.attention(q, k, v, causal=True, bias=bias, sinks=sinks, return_lse=True)
    return out.square().sum() + lse.sum()

compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend=sys.argv[1])(*leaves), leaves)
eager = torch.autograd.grad(step(*leaves), leaves)
for name, a, b in zip(("q", "k", "v", "bias", "sinks"), compiled, eager):
    torch.testing.assert_close(a, b, msg=lambda text: name + text)
print(len(torch._dynamo.utils.counters["graph_break"]))
"""


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_first_call_of_a_process(compiler: str) -> None:
    """Nothing was imported, chosen or cached before: the trace itself is flashtile's first call."""
    assert fresh_process(FIRST_CALL, compiler) == "0"


def inputs(length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((2, length, 4, 16), (2, length, 2, 16), (2, length, 2, 16))
    q, k, v = (torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes)
    return q, k, v


def gradients(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(11)
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)


def check_lengths(function: Callable[..., Tensor], leaves: Callable[[int], tuple[Tensor, ...]] = inputs) -> None:
    """Two lengths may each be compiled, the second with symbols for lengths; five more must find that code ready."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (16, 24, 40, 17, 33, 8, 64):
        tensors = leaves(length)
        with torch._dynamo.config.patch(error_on_recompile=length not in (16, 24)):
            torch.testing.assert_close(gradients(compiled, *tensors), gradients(function, *tensors))


OUTSIDE = masks.Prefix(4) & masks.Window(6, None)

FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda q, k, v: flashtile.attention(q, k, v),
    "causal": lambda q, k, v: flashtile.attention(q, k, v, causal=True),
    "window": lambda q, k, v: flashtile.attention(q, k, v, window=(3, 0)),
    "window-of-the-length": lambda q, k, v: flashtile.attention(q, k, v, window=(q.shape[1] // 2, 0)),
    "mask-made-outside": lambda q, k, v: flashtile.attention(q, k, v, mask=OUTSIDE),
    "mask-made-inside": lambda q, k, v: flashtile.attention(q, k, v, mask=masks.Chunked(8), causal=True),
    "documents": lambda q, k, v: flashtile.attention(q, k, v, mask=masks.Documents((3, 9, 60))),
    "softcap-alibi": lambda q, k, v: flashtile.attention(q, k, v, softcap=9.0, alibi_slopes=torch.arange(1.0, 5.0)),
    "lse": lambda q, k, v: flashtile.attention(q, k, v, return_lse=True)[1],
    "sdpa": lambda q, k, v: flashtile.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
    ),
    "flash-attn": lambda q, k, v: flashtile.flash_attn_func(q, k, v, causal=True),
    "deterministic": lambda q, k, v: flashtile.attention(q, k, v, deterministic=True),
    "backend": lambda q, k, v: flashtile.attention(q, k, v, backend="reference"),
    "merge": lambda q, k, v: flashtile.merge_states(
        *zip(*(flashtile.attention(q, k, v, window=w, return_lse=True) for w in ((2, 0), (5, 1))), strict=True)
    )[0],
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_lengths_do_not_recompile(function: Callable[..., Tensor]) -> None:
    check_lengths(function)


def test_a_recompilation_would_be_noticed() -> None:
    compiled = torch.compile(lambda q: flashtile.attention(q, q, q), fullgraph=True, backend="aot_eager", dynamic=False)
    compiled(torch.randn(1, 8, 2, 4))
    with torch._dynamo.config.patch(error_on_recompile=True), pytest.raises(torch._dynamo.exc.RecompileError):
        compiled(torch.randn(1, 9, 2, 4))


def test_bias_of_changing_shape() -> None:
    def leaves(length: int) -> tuple[Tensor, ...]:
        return *inputs(length), torch.randn(4, length, length).requires_grad_(), torch.randn(4).requires_grad_()

    check_lengths(lambda q, k, v, bias, sinks: flashtile.attention(q, k, v, bias=bias, sinks=sinks), leaves)


def test_queries_and_keys_of_their_own_lengths() -> None:
    def leaves(length: int) -> tuple[Tensor, ...]:
        return inputs(length)[0], *inputs(length + length // 2)[1:]

    check_lengths(lambda q, k, v: flashtile.attention(q, k, v, causal=True), leaves)


def test_three_dimensional_inputs() -> None:
    def leaves(length: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(2, length, 16).requires_grad_() for _ in range(3))

    check_lengths(lambda q, k, v: flashtile.attention(q, k, v), leaves)


def test_packed_sequences_of_changing_lengths() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        return flashtile.attention_varlen(q, k, v, cu_seqlens, None, longest, longest, causal=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")

    def check(*lengths: int) -> None:
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        leaves = tuple(torch.randn(sum(lengths), heads, 16).requires_grad_() for heads in (4, 2, 2))
        results = [
            gradients(lambda *qkv, run=run: run(*qkv, offsets, max(lengths)), *leaves) for run in (compiled, attend)
        ]
        torch.testing.assert_close(*results)

    check(3, 5, 2)
    check(4, 9)
    check(7, 1, 1, 6)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(2, 8, 3)
        check(11, 5, 2, 2, 19)


@pytest.mark.parametrize("form", ["qkv", "kv"])
def test_packed_tensors(form: str) -> None:
    def leaves(length: int) -> tuple[Tensor, ...]:
        if form == "qkv":
            return (torch.randn(2, length, 3, 4, 16).requires_grad_(),)
        return torch.randn(2, length, 4, 16).requires_grad_(), torch.randn(2, length, 2, 2, 16).requires_grad_()

    functions = {"qkv": flashtile.flash_attn_qkvpacked_func, "kv": flashtile.flash_attn_kvpacked_func}
    check_lengths(lambda *tensors: functions[form](*tensors, causal=True), leaves)


def test_dropout_follows_the_generator() -> None:
    """In compiled code PyTorch seeds its own way, so the draw differs from eager; each seed still fixes it."""
    compiled = torch.compile(
        lambda q, k, v: flashtile.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    leaves = inputs(16)
    first, again = gradients(compiled, *leaves), gradients(compiled, *leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    torch.manual_seed(12)
    assert not torch.equal(compiled(*leaves), first[0])


def test_dropout_is_the_same_in_forward_and_backward() -> None:
    """The output is linear in v: with the same elements dropped, <dout, out(v)> = <dv, v>."""
    compiled = torch.compile(
        lambda q, k, v: flashtile.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend="aot_eager"
    )
    q, k, v = inputs(16)
    out = compiled(q, k, v)
    dout = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close((dv * v).sum(), (dout * out).sum())


def note_and_run(served: list[str], name: str, original: Callable[..., Any], *arguments: Any) -> Any:
    served.append(name)
    return original(*arguments)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_use_backend(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[str] = []
    backend = flashtile.dispatch.load("reference")
    for name in ("forward", "backward"):
        monkeypatch.setattr(backend, name, partial(note_and_run, served, name, getattr(backend, name)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if where == "outside":
            return flashtile.attention(q, k, v)
        with flashtile.use_backend("reference"):
            return flashtile.attention(q, k, v)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    leaves = inputs(8)
    if where == "inside":
        gradients(compiled, *leaves)
        assert served == ["forward", "backward"]
        return
    gradients(compiled, *leaves)
    assert served == []
    with flashtile.use_backend("reference"):
        out = compiled(*leaves)
    out.sum().backward()
    assert served == ["forward", "backward"]
    gradients(compiled, *leaves)
    assert served == ["forward", "backward"]


def test_autocast_inside_and_outside() -> None:
    def inside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return flashtile.attention(q, k, v)

    leaves = inputs(8)
    assert torch.compile(inside, fullgraph=True, backend="aot_eager")(*leaves).dtype == torch.bfloat16
    outside = torch.compile(lambda *t: flashtile.attention(*t), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert outside(*leaves).dtype == torch.bfloat16
    assert outside(*leaves).dtype == torch.float32


def test_checkpointed_layer_compiles() -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention(q.sin(), k, v, causal=True).cos()

    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(layer, q, k, v, use_reentrant=False)

    leaves = inputs(8)
    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients(compiled, *leaves), gradients(layer, *leaves))


def test_out_is_written_by_compiled_code() -> None:
    q, k, v = (t.detach() for t in inputs(8))
    out = torch.zeros_like(q)
    compiled = torch.compile(lambda: flashtile.attention(q, k, v, out=out), fullgraph=True, backend="aot_eager")
    result = compiled()
    assert result.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, flashtile.attention(q, k, v))


def test_a_bad_call_is_reported_while_compiling() -> None:
    q, k, v = (t.detach() for t in inputs(8))
    compiled = torch.compile(lambda q, k, v: flashtile.attention(q, k, v), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="k: got head_dim 15, expected 16, the head_dim of q"):
        compiled(q, k[..., :15], v)


def test_strides_of_other_layouts() -> None:
    """Heads first through strides, and a broadcast batch, agree with the layout that the fake kernel promised."""

    def leaves(length: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(2, heads, length, 16).requires_grad_() for heads in (4, 2, 2))

    check_lengths(lambda *qkv: flashtile.attention(*(t.transpose(1, 2) for t in qkv), causal=True), leaves)
    check_lengths(
        lambda q, k, v: flashtile.attention(q[:1].expand(3, -1, -1, -1), *(t[:1].expand(3, -1, -1, -1) for t in (k, v)))
    )


def test_export_keeps_one_attention_node() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flashtile.attention(q, k, v, causal=True)

    dynamic = {1: torch.export.Dim("length", min=2, max=512)}
    tensors = tuple(t.detach() for t in inputs(16))
    program = torch.export.export(Layer(), tensors, dynamic_shapes=(dynamic, dynamic, dynamic))
    nodes = [
        node.target for node in program.graph.nodes if node.op == "call_function" and "flashtile" in str(node.target)
    ]
    assert nodes == [torch.ops.flashtile.forward.default]
    longer = tuple(t.detach() for t in inputs(48))
    torch.testing.assert_close(program.module()(*longer), flashtile.attention(*longer, causal=True))
