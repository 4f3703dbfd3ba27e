"""The readable algorithms: each agrees with standard attention, and counts the traffic that its closed form says."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile.dropout import draw
from flashtile.masks import Causal, Chunked, Documents, Mask, Window
from flashtile.reference import flash1, flash2, flash2_backward, softmax, textbook, traffic
from flashtile.reference.traffic import Shape, Traffic

SHAPES = (
    Shape(37, 53, 8, 5, 16, 8),
    Shape(64, 64, 16, 16, 16, 32, Causal()),
    Shape(40, 20, 4, 4, 8, 8, Causal()),  # the first rows see nothing
    Shape(20, 40, 4, 4, 8, 16, Causal()),
    Shape(50, 50, 4, 4, 7, 9, Window(6, 2)),
    Shape(30, 30, 4, 4, 64, 64, Documents((10, 5))),  # one tile; the last rows see nothing
    Shape(45, 45, 3, 2, 1, 1, Chunked(12, 2)),  # tiles of one element
    Shape(0, 5, 4, 4, 2, 2),
    Shape(5, 0, 4, 4, 2, 2),
)


def shape_name(shape: Shape) -> str:
    return f"{shape.q_len}x{shape.k_len}-{shape.block_q}x{shape.block_k}-{type(shape.mask).__name__}"


every_shape = pytest.mark.parametrize("shape", SHAPES, ids=shape_name)


def one_head(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = ((shape.q_len, shape.dim), (shape.k_len, shape.dim), (shape.k_len, shape.v_dim), (shape.q_len, shape.v_dim))
    return tuple(torch.randn(size, dtype=torch.float64) for size in sizes)


def expected(tensors: tuple[Tensor, ...], mask: Mask | None, dropout_p: float = 0.0) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv of the reference backend."""
    q, k, v = (t[None, :, None].detach().requires_grad_() for t in tensors[:3])
    out, lse = flashtile.attention(q, k, v, mask=mask, dropout_p=dropout_p, return_lse=True, backend="reference")
    grads = torch.autograd.grad(out, (q, k, v), tensors[3][None, :, None])
    return out.detach()[0, :, 0], lse.detach()[0, 0], *(grad[0, :, 0] for grad in grads)


def assert_all_close(results: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for result, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, want, rtol=1e-11, atol=1e-11)


@every_shape
def test_standard_attention(shape: Shape) -> None:
    Q, K, V, dO = tensors = one_head(shape)
    out, _, *grads = expected(tensors, shape.mask)
    forward, backward = Traffic(), Traffic()
    O, P = textbook.forward(Q, K, V, mask=shape.mask, traffic=forward)
    assert_all_close((O, *textbook.backward(Q, K, V, P, dO, traffic=backward)), (out, *grads))
    assert forward == traffic.standard_forward(shape)
    assert backward == traffic.standard_backward(shape)


@every_shape
def test_flash_attention_1(shape: Shape) -> None:
    Q, K, V, dO = tensors = one_head(shape)
    out, lse, *grads = expected(tensors, shape.mask)
    blocks = {"block_q": shape.block_q, "block_k": shape.block_k, "mask": shape.mask}
    forward, backward = Traffic(), Traffic()
    O, l, m = flash1.forward(Q, K, V, **blocks, traffic=forward)
    dqkv = flash1.backward(Q, K, V, O, l, m, dO, **blocks, traffic=backward)
    assert_all_close((O, m + l.log(), *dqkv), (out, lse, *grads))
    assert forward == traffic.fa1_forward(shape)
    assert backward == traffic.fa1_backward(shape)


@every_shape
def test_flash_attention_2(shape: Shape) -> None:
    Q, K, V, dO = tensors = one_head(shape)
    out, lse, *grads = expected(tensors, shape.mask)
    blocks = {"block_q": shape.block_q, "block_k": shape.block_k, "mask": shape.mask}
    forward, backward = Traffic(), Traffic()
    O, L = flash2.forward(Q, K, V, **blocks, traffic=forward)
    dqkv = flash2_backward.backward(Q, K, V, O, L, dO, **blocks, traffic=backward)
    assert_all_close((O, L, *dqkv), (out, lse, *grads))
    assert forward == traffic.fa2_forward(shape)
    assert backward == traffic.fa2_backward(shape)


@pytest.mark.parametrize("blocks", [(8, 8), (16, 64), (5, 3)])
def test_dropout_does_not_depend_on_the_tiles(blocks: tuple[int, int]) -> None:
    shape = Shape(40, 40, 8, 8, *blocks, Causal())
    Q, K, V, dO = tensors = one_head(shape)
    torch.manual_seed(7)
    out, lse, *grads = expected(tensors, shape.mask, dropout_p=0.4)
    torch.manual_seed(7)
    features = {"mask": shape.mask, "dropout_p": 0.4, "rng": draw(Q.device), "block_q": blocks[0], "block_k": blocks[1]}
    O, l, m = flash1.forward(Q, K, V, **features)
    assert_all_close((O, *flash1.backward(Q, K, V, O, l, m, dO, **features)), (out, *grads))
    O, L = flash2.forward(Q, K, V, **features)
    assert_all_close((O, L, *flash2_backward.backward(Q, K, V, O, L, dO, **features)), (out, lse, *grads))


def test_the_gradient_of_lse() -> None:
    shape = Shape(20, 30, 4, 4, 8, 8, Causal())
    Q, K, V, dO = one_head(shape)
    dL = torch.randn(20, dtype=torch.float64)
    q, k, v = (t[None, :, None].detach().requires_grad_() for t in (Q, K, V))
    out, lse = flashtile.attention(q, k, v, causal=True, return_lse=True, backend="reference")
    wanted = torch.autograd.grad((out, lse), (q, k, v), (dO[None, :, None], dL[None, None]))
    O, L = flash2.forward(Q, K, V, block_q=8, block_k=8, mask=Causal())
    results = flash2_backward.backward(Q, K, V, O, L, dO, dL, block_q=8, block_k=8, mask=Causal())
    assert_all_close(results, tuple(t[0, :, 0] for t in wanted))


def test_fully_masked_tiles_are_never_loaded() -> None:
    """FlashAttention-2 skips them, so NaN there stays there; FlashAttention-1 as published computes on every tile."""
    shape = Shape(64, 64, 8, 8, 16, 16, Causal())
    Q, K, V, _ = one_head(shape)
    K[48:], V[48:] = torch.nan, torch.nan
    O, L = flash2.forward(Q, K, V, block_q=16, block_k=16, mask=Causal())
    assert torch.isfinite(O[:48]).all()
    assert torch.isfinite(L[:48]).all()
    assert torch.isnan(O[48:]).all()
    assert torch.isnan(flash1.forward(Q, K, V, block_q=16, block_k=16, mask=Causal())[0]).all()


def test_split_softmax_in_every_order() -> None:
    """Any split of the keys, merged in any order, is the softmax of the whole; blind parts change nothing."""
    S, V = 30 * torch.randn(5, 12, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    S[0], S[1, 4:], S[2, :4] = -torch.inf, -torch.inf, -torch.inf
    wanted, lse = softmax.finish(softmax.attend(S, V))
    assert_all_close((wanted, lse), (softmax.safe_softmax(S) @ V, torch.logsumexp(S, -1)))
    parts = [softmax.attend(S[:, keys], V[keys]) for keys in (slice(0, 4), slice(4, 5), slice(5, 12))]
    for first, second, third in itertools.permutations(parts):
        assert_all_close(softmax.finish(softmax.merge(softmax.merge(first, second), third)), (wanted, lse))
        assert_all_close(softmax.finish(softmax.merge(first, softmax.merge(second, third))), (wanted, lse))


def test_safe_softmax_does_not_overflow() -> None:
    S = torch.tensor([[1e4, 1e4 - 1.0, -1e4], [-torch.inf] * 3], dtype=torch.float64)
    assert torch.isnan(torch.exp(S[:1]) / torch.exp(S[:1]).sum()).any()  # what the maximum saves us from
    assert_all_close((softmax.safe_softmax(S)[:1],), (torch.softmax(S[:1], -1),))
    assert (softmax.safe_softmax(S)[1] == 0).all()


@pytest.mark.parametrize(
    ("fast_memory", "dim", "sizes"), [(4096, 16, (16, 64)), (1000, 64, (4, 4)), (100_000, 128, (128, 196))]
)
def test_block_sizes_of_flash_attention_1(fast_memory: int, dim: int, sizes: tuple[int, int]) -> None:
    assert traffic.fa1_block_sizes(fast_memory, dim) == sizes


def test_order_of_the_traffic() -> None:
    """Theorem 2: standard attention moves Theta(N d + N^2) elements, FlashAttention-1 Theta(N^2 d^2 / M)."""

    def fa1(n: int, fast_memory: int) -> int:
        return traffic.fa1_forward(Shape(n, n, 64, 64, *traffic.fa1_block_sizes(fast_memory, 64))).total

    def standard(n: int) -> int:
        return traffic.standard_forward(Shape(n, n, 64, 64, 1, 1)).total

    assert standard(16384) / standard(8192) == pytest.approx(4, rel=0.02)
    assert fa1(16384, 50_000) / fa1(8192, 50_000) == pytest.approx(4, rel=0.02)
    assert fa1(16384, 25_000) / fa1(16384, 100_000) == pytest.approx(4, rel=0.02)
    assert fa1(16384, 50_000) < standard(16384)


def test_flash_attention_2_moves_less() -> None:
    """Two thirds of version 1's forward with the same tiles, since O stays; a causal mask saves about half of that."""
    full = Shape(8192, 8192, 64, 64, 128, 128)
    causal = full._replace(mask=Causal())
    assert traffic.fa2_forward(full).total == pytest.approx(traffic.fa1_forward(full).total * 2 / 3, rel=0.03)
    assert traffic.fa2_forward(causal).total == pytest.approx(traffic.fa2_forward(full).total / 2, rel=0.05)
    assert traffic.fa1_forward(causal) == traffic.fa1_forward(full)
    assert traffic.fa2_backward(full).total < traffic.fa1_backward(full).total
