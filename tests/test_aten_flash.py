"""The kernels that FLASHTILE puts into PyTorch's dispatcher, called as ATen calls them; on a GPU by PyTorch itself."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import close, gradients, standard
from torch import Tensor

from flashtile.integrations import aten_flash

GPU = torch.cuda.is_available()
LISTED = hasattr(torch.nn.attention, "register_flash_attention_impl")
needs_list = pytest.mark.skipif(not LISTED, reason="this PyTorch has no list of flash attentions")


def qkv(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]


@needs_list
def test_the_name_is_known_to_pytorch() -> None:
    assert "FLASHTILE" in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None, "nobody asked for it"


@needs_list
@pytest.mark.skipif(GPU, reason="there is a GPU")
def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(RuntimeError, match="FLASHTILE: .* no CUDA device; flashtile.replace_sdpa"):
        torch.nn.attention.activate_flash_attention_impl("FLASHTILE")
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.mark.parametrize("name", aten_flash._KERNELS)
def test_signatures_are_those_of_aten(name: str) -> None:
    """Names and order, read from PyTorch's own schema; a default of ours is PyTorch's."""
    kernel = aten_flash._KERNELS[name]
    if kernel is aten_flash._forward_inplace:
        kernel = aten_flash._forward
    ours = [p for p in inspect.signature(kernel).parameters.values() if p.name != "out" or "backward" in name]
    theirs = [
        a for a in getattr(torch.ops.aten, name).default._schema.arguments if a.name != "out" or "backward" in name
    ]
    for argument, parameter in zip(theirs, ours, strict=False):
        assert argument.name == parameter.name
        assert argument.kwarg_only == (parameter.kind is inspect.Parameter.KEYWORD_ONLY)
    assert len(theirs) <= len(ours)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_sdpa_kernels(causal: bool) -> None:
    leaves = qkv(2, 3, 9, 8)
    detached = [t.detach() for t in leaves]
    out, lse, *rest, state, unused, debug = aten_flash._sdpa_forward(*detached, 0.0, causal, False, scale=0.4)
    want = F.scaled_dot_product_attention(*leaves, is_causal=causal, scale=0.4)
    close(out, want)
    assert out.stride() == torch.empty_like(detached[0]).stride()
    assert rest == [None, None, 9, 9]
    assert state.dtype == unused.dtype == torch.uint64 and debug.numel() == 0
    seen = torch.ones(9, 9, dtype=torch.bool).tril() if causal else None
    close(lse, standard(*(t.transpose(1, 2) for t in leaves), scale=0.4, seen=seen)[1])
    dout = torch.randn_like(want)
    grads = aten_flash._sdpa_backward(
        dout, *detached, out, lse, None, None, 9, 9, 0.0, causal, state, unused, scale=0.4
    )
    close(list(grads), gradients((want,), leaves, [dout]))


@pytest.mark.parametrize("window", [(None, None), (-1, -1), (3, 0), (2, 1)])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_flash_kernels(causal: bool, window: tuple[int | None, int | None]) -> None:
    q, k, v = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    detached = [t.detach() for t in leaves]
    sides = {"window_size_left": window[0], "window_size_right": window[1]}
    distance = torch.arange(7) - torch.arange(5)[:, None] - 2
    left, right = (None if side in (None, -1) else side for side in window)
    seen = torch.ones(5, 7, dtype=torch.bool)
    seen = seen if left is None else seen & (distance >= -left)
    seen = seen if right is None else seen & (distance <= right)
    want, want_lse = standard(*leaves, seen=seen & (distance <= 0) if causal else seen)
    arguments = (*detached, None, None, 5, 7, 0.0, causal)
    out, lse, state, unused, _ = aten_flash._forward(*arguments, False, **sides, num_splits=1)
    close((out, lse), (want, want_lse))
    given = torch.empty_like(out)
    close(aten_flash._forward_inplace(given, *arguments, False, **sides), want_lse)
    close(given, want)
    dout = torch.randn_like(out)
    grads = aten_flash._backward(
        dout, *detached, out, lse, None, None, 5, 7, 0.0, causal, state, unused, scale=None, **sides
    )
    close(list(grads), gradients((want,), leaves, [dout]))


def test_packed_sequences_and_alibi() -> None:
    leaves, offsets = qkv(12, 2, 8), torch.tensor([0, 5, 12], dtype=torch.int32)
    slopes = torch.tensor([0.2, 0.5])
    detached = [t.detach() for t in leaves]
    arguments = (*detached, offsets, offsets, 7, 7, 0.0, True)
    out, lse, state, unused, _ = aten_flash._forward(*arguments, False)
    parts = [
        standard(*(t[None, a:b] for t in leaves), seen=torch.ones(b - a, b - a).tril().bool())
        for a, b in ((0, 5), (5, 12))
    ]
    want, want_lse = torch.cat([p[0][0] for p in parts]), torch.cat([p[1][0] for p in parts], 1)
    close((out, lse), (want, want_lse))
    dout = torch.randn_like(out)
    grads = aten_flash._backward(dout, *detached, out, lse, offsets, offsets, 7, 7, 0.0, True, state, unused)
    close(list(grads), gradients((want,), leaves, [dout]))
    biased = aten_flash._forward(*arguments, False, alibi_slopes=slopes)[0]
    assert not torch.allclose(biased, out)


def test_dropout_is_the_same_in_the_backward() -> None:
    """The output is linear in v: with the same elements dropped, <dout, out(v)> = <dv, v>."""
    q, k, v = (t.detach() for t in qkv(2, 3, 9, 8))
    out, lse, _, _, _, _, state, unused, _ = aten_flash._sdpa_forward(q, k, v, 0.5)
    dout = torch.randn_like(out)
    dv = aten_flash._sdpa_backward(dout, q, k, v, out, lse, None, None, 9, 9, 0.5, False, state, unused)[2]
    close((dv * v).sum(), (dout * out).sum())
    other = torch.zeros_like(state)
    wrong = aten_flash._sdpa_backward(dout, q, k, v, out, lse, None, None, 9, 9, 0.5, False, other, unused)[2]
    assert not torch.allclose((wrong * v).sum(), (dout * out).sum())


@pytest.mark.parametrize(
    ("given", "value"),
    [("seqused_k", torch.ones(2)), ("block_table", torch.ones(2)), ("num_splits", 4), ("return_debug_mask", True)],
)
def test_refusals(given: str, value: Any) -> None:
    q = torch.randn(2, 5, 4, 8)
    debug = given == "return_debug_mask"
    options = {} if debug else {given: value}
    with pytest.raises(NotImplementedError, match=f"^{given}: got .*, which FLASHTILE does not serve"):
        aten_flash._forward(q, q, q, None, None, 5, 5, 0.0, False, debug, **options)
    if debug:
        with pytest.raises(NotImplementedError, match="return_debug_mask"):
            aten_flash._sdpa_forward(*(q.transpose(1, 2),) * 3, 0.0, False, True)


@pytest.mark.gpu
@needs_list
def test_pytorch_itself_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    run = aten_flash.run_forward

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return run(*arguments)

    monkeypatch.setattr(aten_flash, "run_forward", counted)
    leaves = [torch.randn(2, 4, 128, 64, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)]

    def attend() -> list[Tensor]:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(*leaves, is_causal=True)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    theirs = attend()
    torch.nn.attention.activate_flash_attention_impl("FLASHTILE")
    try:
        ours = attend()
        assert calls == 1
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    attend()
    assert calls == 1, "PyTorch has its own kernel back"
