"""`scaled_dot_product_attention` against PyTorch's own: values, gradients, shapes, strides, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import close, gradients
from torch import Tensor

import flashtile
from flashtile import ops
from flashtile.problem import Call

Shape = tuple[int, ...]

# id: shapes of query, key and value, and what else is given.
SHAPES: dict[str, tuple[Shape, Shape, Shape, dict[str, Any]]] = {
    "4d": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), {}),
    "4d-more-queries": ((2, 3, 9, 8), (2, 3, 4, 8), (2, 3, 4, 8), {}),
    "value-dim": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 4), {}),
    "3d": ((3, 5, 8), (3, 7, 8), (3, 7, 8), {}),
    "2d": ((5, 8), (7, 8), (7, 8), {}),
    "5d": ((2, 3, 4, 5, 8), (2, 3, 4, 7, 8), (2, 3, 4, 7, 8), {}),
    "6d": ((2, 1, 3, 4, 5, 8), (2, 1, 3, 4, 7, 8), (2, 1, 3, 4, 7, 8), {}),
    "one-key-batch": ((2, 3, 5, 8), (1, 3, 7, 8), (1, 3, 7, 8), {}),
    "one-query-batch": ((1, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), {}),
    "one-key-head": ((2, 3, 5, 8), (2, 1, 7, 8), (2, 1, 7, 8), {}),
    "one-query-head": ((2, 1, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8), {}),
    "one-value-head": ((2, 3, 5, 8), (2, 3, 7, 8), (2, 1, 7, 8), {}),
    "fewer-key-dims": ((2, 3, 5, 8), (3, 7, 8), (7, 8), {}),
    "5d-broadcast": ((2, 3, 4, 5, 8), (3, 1, 7, 8), (2, 1, 4, 7, 8), {}),
    "gqa": ((2, 6, 5, 8), (2, 2, 7, 8), (2, 2, 7, 8), {"enable_gqa": True}),
    "gqa-3d": ((6, 5, 8), (2, 7, 8), (2, 7, 8), {"enable_gqa": True}),
    "gqa-5d": ((2, 2, 4, 5, 8), (2, 2, 2, 7, 8), (2, 2, 2, 7, 8), {"enable_gqa": True}),
    "gqa-one-batch": ((2, 4, 5, 8), (1, 2, 7, 8), (1, 2, 7, 8), {"enable_gqa": True}),
    "gqa-equal-heads": ((2, 4, 5, 8), (2, 4, 7, 8), (2, 4, 7, 8), {"enable_gqa": True}),
    "no-keys": ((2, 3, 5, 8), (2, 3, 0, 8), (2, 3, 0, 8), {}),
    "no-queries": ((2, 3, 0, 8), (2, 3, 7, 8), (2, 3, 7, 8), {}),
    "no-batch": ((0, 3, 5, 8), (0, 3, 7, 8), (0, 3, 7, 8), {}),
    "no-heads": ((2, 0, 5, 8), (2, 0, 7, 8), (2, 0, 7, 8), {}),
    "no-batch-5d": ((0, 3, 4, 5, 8), (0, 3, 4, 7, 8), (0, 3, 4, 7, 8), {}),
}


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def check_against_torch(leaves: list[Tensor], options: dict[str, Any], mask: Tensor | None = None) -> None:
    """Equal results and gradients of query, key, value and an additive mask."""
    ours = flashtile.scaled_dot_product_attention(*leaves, attn_mask=mask, **options)
    theirs = F.scaled_dot_product_attention(*leaves, attn_mask=mask, **options)
    assert ours.dtype == theirs.dtype
    close(ours, theirs)
    if mask is not None and mask.requires_grad:
        leaves = [*leaves, mask]
    dout = torch.randn_like(theirs)
    close(gradients((ours,), leaves, [dout]), gradients((theirs,), leaves, [dout]))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape: str, causal: bool) -> None:
    *shapes, options = SHAPES[shape]
    check_against_torch([randn(*s) for s in shapes], {**options, "is_causal": causal})


@pytest.mark.parametrize("scale", [None, 0.25, 1, 0.0, -0.5])
def test_scale(scale: float | None) -> None:
    check_against_torch([randn(2, 3, 5, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8)], {"scale": scale})


MASKS = [(5, 7), (1, 7), (5, 1), (1, 1), (3, 5, 7), (3, 1, 7), (1, 5, 7), (2, 1, 5, 7), (1, 3, 5, 7), (2, 3, 5, 7)]


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks(shape: Shape) -> None:
    leaves = [randn(2, 3, 5, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8)]
    check_against_torch(leaves, {}, randn(*shape))
    check_against_torch(leaves, {}, torch.randn(shape) > 0)
    check_against_torch(
        leaves, {}, torch.randn(shape, dtype=torch.float64).masked_fill(torch.randn(shape) > 0, -torch.inf)
    )


@pytest.mark.parametrize(
    "shape", [(5, 7), (4, 5, 7), (3, 4, 5, 7), (1, 1, 5, 7), (2, 3, 1, 5, 7), (2, 1, 4, 5, 7)], ids=str
)
def test_masks_of_more_dimensions(shape: Shape) -> None:
    leaves = [randn(2, 3, 4, 5, 8), randn(2, 3, 4, 7, 8), randn(2, 3, 4, 7, 8)]
    check_against_torch(leaves, {}, randn(*shape))
    check_against_torch(leaves, {}, torch.randn(shape) > 0)


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7), (1, 5, 7)], ids=str)
def test_masks_of_three_dimensions(shape: Shape) -> None:
    check_against_torch([randn(3, 5, 8), randn(3, 7, 8), randn(3, 7, 8)], {}, randn(*shape))


def test_rows_that_see_nothing_give_zero() -> None:
    leaves = [randn(2, 3, 5, 8), randn(2, 3, 7, 8), randn(2, 3, 7, 8)]
    seen = torch.arange(35).view(5, 7) > 16
    check_against_torch(leaves, {}, seen)
    out = flashtile.scaled_dot_product_attention(*leaves, attn_mask=seen)
    assert not bool(out[:, :, :2].any())


@given(
    st.integers(1, 3), st.sampled_from([(1, 1), (2, 1), (4, 2), (6, 3)]), st.integers(1, 40), st.integers(1, 40),
    st.integers(1, 20), st.sampled_from(["full", "causal", "boolean", "additive"]),
)  # fmt: skip
def test_random_calls(batch: int, heads: tuple[int, int], q_len: int, k_len: int, dim: int, kind: str) -> None:
    leaves = [randn(batch, heads[0], q_len, dim), *(randn(batch, heads[1], k_len, dim) for _ in range(2))]
    mask = torch.rand(batch, 1, q_len, k_len) > 0.3 if kind == "boolean" else None
    mask = randn(heads[0], 1, k_len) if kind == "additive" else mask
    check_against_torch(leaves, {"enable_gqa": True, "is_causal": kind == "causal"}, mask)


ORDERS = [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_strides_are_as_torch_gives_them(order: Shape, dtype: torch.dtype) -> None:
    # order: which of (batch, heads, seqlen) is outermost in memory; (0, 2, 1) is the transposed view that models pass.
    sizes = (2, 3, 5)
    query = torch.randn(*(sizes[axis] for axis in order), 8, dtype=dtype)
    query = query.permute(*(order.index(axis) for axis in range(3)), 3)
    assert query.shape == (2, 3, 5, 8)
    ours = flashtile.scaled_dot_product_attention(query, query, query)
    theirs = F.scaled_dot_product_attention(query, query, query)
    assert ours.stride() == theirs.stride()
    leaf = query.detach().requires_grad_()
    out = flashtile.scaled_dot_product_attention(leaf, leaf, leaf)
    assert out.stride() == theirs.stride()
    assert gradients((out,), [leaf], [torch.ones_like(out)])[0].stride() == leaf.stride()


def test_no_tensor_is_copied_on_the_way_in(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = []
    attend = ops.attention

    def remember(call: Call) -> tuple[Tensor, Tensor]:
        calls.append(call)
        return attend(call)

    monkeypatch.setattr(ops, "attention", remember)
    query, key, value = torch.randn(2, 4, 5, 8), torch.randn(2, 7, 2, 8).transpose(1, 2), torch.randn(2, 2, 7, 8)
    flashtile.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    for given_, reached in zip((query, key, value), calls[0][:3], strict=True):
        assert reached.data_ptr() == given_.data_ptr()
        assert reached.stride() == given_.transpose(1, 2).stride()
    flashtile.scaled_dot_product_attention(query[:, :2], key[:1], value[:1])
    assert calls[1].k.data_ptr() == key.data_ptr()
    assert calls[1].k.stride(0) == 0, "a broadcast batch is a stride of 0"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_lower_precisions_are_as_exact_as_torch(dtype: torch.dtype) -> None:
    wide = [torch.randn(2, 4, 65, 64, dtype=torch.float64) for _ in range(3)]
    narrow = [t.to(dtype) for t in wide]
    exact = F.scaled_dot_product_attention(*(t.double() for t in narrow), is_causal=True)
    ours = flashtile.scaled_dot_product_attention(*narrow, is_causal=True)
    theirs = F.scaled_dot_product_attention(*narrow, is_causal=True)
    error, allowed = (float((t.double() - exact).abs().max()) for t in (ours, theirs))
    assert ours.dtype == dtype
    assert error <= 2 * allowed + torch.finfo(dtype).eps / 2 * float(exact.abs().max())
    with torch.autocast("cpu", torch.bfloat16):
        cast = flashtile.scaled_dot_product_attention(*(t.float() for t in wide), is_causal=True)
    assert cast.dtype == F.scaled_dot_product_attention(*(t.bfloat16() for t in wide)).dtype


def test_float32_mask_beside_bfloat16() -> None:
    query, mask = torch.randn(2, 3, 5, 8).bfloat16(), torch.randn(5, 5)
    ours = flashtile.scaled_dot_product_attention(query, query, query, attn_mask=mask)
    exact = F.scaled_dot_product_attention(*[query.double()] * 3, attn_mask=mask.double())
    assert float((ours.double() - exact).abs().max()) < 2**-7 * float(exact.abs().max())


def test_dropout() -> None:
    query = torch.randn(2, 3, 64, 16, dtype=torch.float64)
    eye = torch.eye(64, dtype=torch.float64).expand(2, 3, 64, 64)  # as values: the result is the dropped weights

    def weights(p: float, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return flashtile.scaled_dot_product_attention(query, query, eye, dropout_p=p)

    undropped, dropped = weights(0.0, 1), weights(0.25, 1)
    assert torch.equal(dropped, weights(0.25, 1))
    assert not torch.equal(dropped, weights(0.25, 2))
    kept = dropped != 0
    close(dropped[kept], undropped[kept] / 0.75)
    assert abs(kept.double().mean().item() - 0.75) < 5 * (0.25 * 0.75 / kept.numel()) ** 0.5
    assert not bool(weights(1.0, 1).any())


@pytest.mark.parametrize(
    "shapes", [((2, 3, 5, 8), (2, 2, 7, 8)), ((2, 3, 5, 8), (3, 3, 7, 8)), ((2, 3, 5, 8), (2, 3, 7, 9))]
)
def test_what_torch_refuses_is_refused(shapes: tuple[Shape, Shape]) -> None:
    query, key = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(query, key, key)
    with pytest.raises(ValueError, match="^key: got "):
        flashtile.scaled_dot_product_attention(query, key, key)


def test_causal_with_a_mask_is_refused() -> None:
    query, mask = torch.zeros(3, 5, 8), torch.zeros(5, 5)
    with pytest.raises(RuntimeError, match="attn_mask"):
        F.scaled_dot_product_attention(query, query, query, attn_mask=mask, is_causal=True)
    with pytest.raises(ValueError, match="attn_mask"):
        flashtile.scaled_dot_product_attention(query, query, query, attn_mask=mask, is_causal=True)


def test_another_alignment_is_caught() -> None:
    # Bottom-right causal, what flash_attn means by it, differs as soon as the lengths do.
    q, k = torch.randn(2, 5, 3, 8, dtype=torch.float64), torch.randn(2, 7, 3, 8, dtype=torch.float64)
    theirs = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, k)), is_causal=True)
    with pytest.raises(AssertionError):
        close(flashtile.flash_attn_func(q, k, k, causal=True).transpose(1, 2), theirs)
