"""The reference backend, the oracle of all others, against formulas that share no code with it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import flashtile
from flashtile.masks import Causal, Window
from flashtile.testing import CASES, Case, build, evaluate
from flashtile.testing.accuracy import check_same_form, check_same_nonfinite

TIGHT = 1e-12  # float64 rounds at 1e-16, and the longest sums here have 700 terms


def assert_equal(name: str, result: Tensor, expected: Tensor) -> None:
    check_same_form(name, result, expected)
    check_same_nonfinite(name, result, expected)
    finite = torch.isfinite(expected)
    torch.testing.assert_close(result[finite], expected[finite], rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_agrees_with_plain_pytorch(case: Case) -> None:
    """Forward and every gradient, in float64; autograd of plain operations knows nothing of our backward."""
    inputs = build(case, torch.float64)
    results, expected = evaluate(case, inputs, "reference"), evaluate(case, inputs, None)
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert_equal(name, result, expected[name])


def test_the_comparison_rejects_a_wrong_result() -> None:
    right = torch.tensor([1.0, -torch.inf, 3.0], dtype=torch.float64)
    for wrong in (right + 1e-9, right.nan_to_num(neginf=0.0), right[:2], right.float()):
        with pytest.raises(AssertionError):
            assert_equal("out", wrong, right)


def rows(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2), (4, 1)])
@pytest.mark.parametrize("kind", ["full", "causal", "boolean", "additive"])
def test_agrees_with_torch_sdpa(heads: int, kv_heads: int, kind: str) -> None:
    q, k, v = rows(2, 33, heads, 16), rows(2, 33, kv_heads, 16), rows(2, 33, kv_heads, 24)
    bias = None
    if kind == "boolean":
        bias = torch.rand(2, heads, 33, 33) < 0.7
    elif kind == "additive":
        bias = rows(2, heads, 33, 33)
    out = flashtile.attention(q, k, v, causal=kind == "causal", bias=bias, backend="reference")
    theirs = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias, is_causal=kind == "causal", enable_gqa=True
    ).transpose(1, 2)
    inputs = [t for t in (q, k, v, bias) if t is not None and t.requires_grad]
    dout = torch.randn_like(theirs)
    assert isinstance(out, Tensor)
    assert_equal("out", out, theirs)
    for ours, expected in zip(
        torch.autograd.grad(out, inputs, dout), torch.autograd.grad(theirs, inputs, dout), strict=True
    ):
        assert_equal("gradient", ours, expected)


def test_scores_are_what_the_documentation_says() -> None:
    """One pair at a time: softcap of the scaled product, then the slope times the distance, then the bias."""
    q, k, v, bias, sinks = (rows(*n).detach() for n in ((1, 4, 2, 3), (1, 6, 1, 3), (1, 6, 1, 3), (1, 2, 4, 6), (2,)))
    slopes = torch.tensor([0.5, 0.25])
    out, lse = flashtile.attention(
        q,
        k,
        v,
        scale=0.7,
        softcap=1.5,
        alibi_slopes=slopes,
        bias=bias,
        sinks=sinks,
        window=(3, 1),
        return_lse=True,
        backend="reference",
    )
    for h in range(2):
        for i in range(4):
            position = i + 6 - 4
            scores = {
                j: 1.5 * math.tanh(0.7 * float(q[0, i, h] @ k[0, j, 0]) / 1.5)
                - float(slopes[h]) * abs(position - j)
                + float(bias[0, h, i, j])
                for j in range(6)
                if position - 3 <= j <= position + 1
            }
            denominator = math.exp(float(sinks[h])) + sum(map(math.exp, scores.values()))
            expected = sum(math.exp(s) / denominator * v[0, j, 0] for j, s in scores.items())
            assert_equal("out", out[0, i, h], expected)
            assert float(lse[0, h, i]) == pytest.approx(math.log(denominator), abs=TIGHT)


def test_half_precision_is_computed_in_float32() -> None:
    """Only the inputs' and the result's own rounding remains: half as far from float64 as bfloat16 arithmetic."""
    case = Case("precision", "", q_len=64, k_len=64, mask=Causal())
    inputs = build(case, torch.bfloat16)
    exact = evaluate(case, inputs.in_float64(), "reference")
    results = evaluate(case, inputs, "reference")
    one_rounding = torch.finfo(torch.bfloat16).eps / 2 * 1.01
    for name in ("out", "dv"):
        torch.testing.assert_close(results[name].double(), exact[name], rtol=one_rounding, atol=1e-5)
    assert results["lse"].dtype == torch.float32
    torch.testing.assert_close(results["lse"].double(), exact["lse"], rtol=1e-6, atol=1e-6)


def test_writes_into_out() -> None:
    q, k, v = (torch.randn(2, 9, 2, 8) for _ in range(3))
    expected = flashtile.attention(q, k, v, backend="reference")
    memory = torch.full((2, 2, 9, 8), torch.nan)
    out = memory.transpose(1, 2)
    assert flashtile.attention(q, k, v, out=out, backend="reference") is out
    assert torch.equal(out, expected)


def test_rows_that_see_nothing() -> None:
    q, k, v = rows(1, 5, 1, 4), rows(1, 2, 1, 4), rows(1, 2, 1, 4)
    out, lse = flashtile.attention(q, k, v, mask=Window(None, 0), return_lse=True, backend="reference")
    assert (out[0, :3] == 0).all()
    assert (lse[0, 0, :3] == -torch.inf).all()
    assert torch.isfinite(lse[0, 0, 3:]).all()
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    assert (dq[0, :3] == 0).all()
    assert all(torch.isfinite(t).all() for t in (dq, dk, dv))
