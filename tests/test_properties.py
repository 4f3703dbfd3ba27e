"""Any shape with any features: backends against float64, the reference against plain PyTorch, algorithms against it."""

from __future__ import annotations

import drawn
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GPU, on_hopper

import flashtile
from flashtile.reference import flash1, flash2, flash2_backward, traffic
from flashtile.reference.traffic import Shape, Traffic
from flashtile.testing import Case, build, evaluate, run_case
from flashtile.testing.accuracy import check_same_nonfinite

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=300)
@given(drawn.cases(longest=150, most_heads=6), DTYPES)
def test_blocked(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "blocked", dtype)


@settings(max_examples=150)
@given(drawn.cases(longest=60, most_heads=6))
def test_reference(case: Case) -> None:
    """In float64 against autograd of plain operations."""
    inputs = build(case, torch.float64)
    results, expected = evaluate(case, inputs, "reference"), evaluate(case, inputs, None)
    for name, result in results.items():
        check_same_nonfinite(name, result, expected[name])
        finite = torch.isfinite(result)
        torch.testing.assert_close(result[finite], expected[name][finite], rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(GPU, reason="this process compiles Triton kernels, it does not interpret them")
@settings(max_examples=25)
@given(drawn.cases(longest=90, most_heads=2, longest_batch=2), st.sampled_from([torch.float32, torch.float16]))
def test_triton_interpreted(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "triton", dtype)


@pytest.mark.gpu
@settings(max_examples=10)  # each compiles kernels of its own
@given(drawn.cases(longest=700, most_heads=4), st.sampled_from([torch.bfloat16, torch.float16]))
def test_triton(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "triton", dtype, "cuda")


@pytest.mark.gpu
@on_hopper
@settings(max_examples=10)
@given(drawn.cases(longest=700, most_heads=4), st.sampled_from([torch.bfloat16, torch.float16]))
def test_hopper(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "hopper", dtype, "cuda")


@settings(max_examples=60)
@given(st.data())
def test_readable_algorithms(data: st.DataObject) -> None:
    """FlashAttention-1 and -2 with any tile sizes, forward and backward, and their closed forms of traffic."""
    n, m, blocks = st.integers(1, 40), st.integers(1, 40), st.integers(1, 48)
    shape = Shape(data.draw(n), data.draw(m), 4, 3, data.draw(blocks), data.draw(blocks))
    shape = shape._replace(mask=data.draw(drawn.masks(shape.q_len)))
    Q, K, V, dO = (
        torch.randn(size, dtype=torch.float64)
        for size in ((shape.q_len, 4), (shape.k_len, 4), (shape.k_len, 3), (shape.q_len, 3))
    )
    q, k, v = (t[None, :, None].clone().requires_grad_() for t in (Q, K, V))
    out, lse = flashtile.attention(q, k, v, mask=shape.mask, return_lse=True, backend="reference")
    grads = torch.autograd.grad(out, (q, k, v), dO[None, :, None])
    expected = [t.detach()[0, :, 0] for t in (out, *grads)]
    features = {"block_q": shape.block_q, "block_k": shape.block_k, "mask": shape.mask}
    counts = [Traffic() for _ in range(4)]
    O1, l, row_max = flash1.forward(Q, K, V, **features, traffic=counts[0])
    first = [O1, *flash1.backward(Q, K, V, O1, l, row_max, dO, **features, traffic=counts[1])]
    O2, L = flash2.forward(Q, K, V, **features, traffic=counts[2])
    second = [O2, *flash2_backward.backward(Q, K, V, O2, L, dO, **features, traffic=counts[3])]
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected)
    torch.testing.assert_close(L, lse.detach()[0, 0])
    closed = (traffic.fa1_forward, traffic.fa1_backward, traffic.fa2_forward, traffic.fa2_backward)
    assert counts == [count(shape) for count in closed]
