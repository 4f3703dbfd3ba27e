"""Extremes: huge scores, equal scores, -inf, empty rows, and where NaN may and may not go."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from places import PLACES_16_BIT, every_place
from torch import Tensor

import flashtile
from flashtile.masks import Causal, Window
from flashtile.testing import Case, build, case, evaluate, run_case
from flashtile.testing.accuracy import check_same_nonfinite

# NumPy, with which Triton's interpreter computes, says so aloud; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")

every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def gradients(out: Tensor, lse: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse)))


def leaf(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


@every_place
@every_dtype
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_scores_of_ten_thousand(backend: str, device: str, dtype: torch.dtype, sign: float) -> None:
    """Products beyond float16's largest number, 65504, and scores of +-1e4: nothing overflows before it is scaled."""
    huge = Case("huge", "", q_len=40, k_len=70, dim=64, amplitude=sign * 3000.0, mask=Causal())
    inputs = build(huge, dtype)
    products = torch.einsum("bmhd,bnhd->bhmn", inputs.q.double(), inputs.k.double())
    assert products.abs().max() > 65504
    assert products.abs().max() / 8 > 1e4
    run_case(huge, backend, dtype, device)


@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES_16_BIT if place.values[0] != "blocked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("leap", [9.0, 14.0, 40.0, 200.0])
@pytest.mark.parametrize("keys", ["each tile", "one key"])
def test_scores_that_leap(backend: str, device: str, dtype: torch.dtype, leap: float, keys: str) -> None:
    """Scores that rise from tile to tile, in the order in which they are visited, by more than exp can hold in 16 or 32
    bits, in all or some rows. `blocked` rounds the scores to bfloat16.
    """
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 64, generator=generator) for n in (300, 400, 400))
    q[..., 0] = 8.0
    q[:, ::7, 1, 0] = 0.0
    k[..., 0] = (399 - torch.arange(400)).div(64, rounding_mode="floor")[:, None] * leap if keys == "each tile" else 0.0
    k[:, 3, :, 0] += leap
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    for causal in (False, True):
        out, lse = flashtile.attention(q, k, v, causal=causal, backend=backend, return_lse=True)
        scores = torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double()) / 8
        if causal:
            scores.masked_fill_(torch.ones(300, 400, dtype=torch.bool, device=device).triu(101), -torch.inf)
        expected = torch.einsum("bhmn,bnhd->bmhd", torch.softmax(scores, -1), v.double())
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("backend", "device"), PLACES_16_BIT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_of_many_weights(backend: str, device: str, dtype: torch.dtype) -> None:
    """Thousands of keys with the same score, and a few that hardly count."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 64, generator=generator) for n in (70, 9000, 9000))
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0] = 8.0
    k[:, ::50, :, 0] = -6.0
    q, k, v = (x.to(device, dtype) for x in (q, k, v + 1))
    out, lse = flashtile.attention(q, k, v, backend=backend, return_lse=True)
    scores = k[:, :, 0, 0].double()
    expected = torch.softmax(scores, -1)[:, None] @ v[:, :, 0].double()
    torch.testing.assert_close(out[:, :, 0].double(), expected.expand(1, 70, 64), rtol=2e-3, atol=5e-3)
    torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1).expand(1, 1, 70), rtol=1e-5, atol=1e-5)


@every_place
@every_dtype
def test_values_near_the_largest_number(backend: str, device: str, dtype: torch.dtype) -> None:
    """A mean never exceeds its largest value, though the sum that it comes from does."""
    q, k = (torch.zeros(1, 100, 1, 16, device=device, dtype=dtype) for _ in range(2))
    v = torch.full((1, 100, 1, 16), 6e4, device=device, dtype=dtype)
    out = flashtile.attention(q, k, v, backend=backend)
    assert torch.equal(out, v)


@every_place
@every_dtype
@pytest.mark.parametrize("dim", [64, 128, 192])
@pytest.mark.parametrize("amplitude", [1.0, 40.0])
def test_products_of_gradients_and_values(
    backend: str, device: str, dtype: torch.dtype, amplitude: float, dim: int
) -> None:
    """dP beyond float16's largest number, 65504, where weights are so small that no gradient is."""
    q, k, v = (leaf(1, 200, 1, dim, dtype=dtype, device=device) for _ in range(3))
    grad_out = torch.sign(v.detach()) * amplitude
    with torch.no_grad():
        q *= 0.1
        v *= amplitude
    out = flashtile.attention(q, k, v, backend=backend)
    found = torch.autograd.grad(out, (q, k, v), grad_out)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    weights = torch.softmax(torch.einsum("bmhd,bnhd->bhmn", wide[0], wide[1]) / math.sqrt(dim), -1)
    expected = torch.autograd.grad(torch.einsum("bhmn,bnhd->bmhd", weights, wide[2]), wide, grad_out.double())
    products = torch.einsum("bmhd,bnhd->bhmn", grad_out.double(), wide[2])
    assert (products.abs().max() > 65504) == (amplitude > 1)
    share = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 2e-5}[dtype]
    for got, want in zip(found, expected, strict=True):
        assert (got.double() - want).norm() <= share * want.norm()


@every_place
@every_dtype
def test_equal_keys_give_the_mean(backend: str, device: str, dtype: torch.dtype) -> None:
    q = leaf(2, 33, 2, 16, dtype=dtype, device=device)
    k = leaf(2, 1, 2, 16, dtype=dtype, device=device).detach().expand(2, 64, 2, 16).requires_grad_()
    v = leaf(2, 64, 2, 16, dtype=dtype, device=device)
    out, lse = flashtile.attention(q, k, v, return_lse=True, backend=backend)
    mean = v.detach().double().mean(1, keepdim=True).expand_as(out)
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), mean, rtol=2 * unit, atol=2 * unit)
    scores = torch.einsum("bmhd,bhd->bhm", q.double(), k[:, 0].double()) / 4
    torch.testing.assert_close(lse.double(), scores + math.log(64), rtol=4 * unit, atol=4 * unit)


@every_place
def test_a_key_of_minus_infinity_bias_is_no_key(backend: str, device: str) -> None:
    q, k, v = (leaf(1, 50, 2, 16, device=device) for _ in range(3))
    gone = torch.rand(50, device=device) < 0.3
    bias = torch.zeros(50, device=device).masked_fill(gone, -torch.inf).requires_grad_()
    out, lse = flashtile.attention(q, k, v, bias=bias, return_lse=True, backend=backend)
    rest = flashtile.attention(q, k[:, ~gone], v[:, ~gone], return_lse=True, backend=backend)
    torch.testing.assert_close((out, lse), rest)
    _, dk, dv, dbias = gradients(out, lse, q, k, v, bias)
    for grad in (dk[:, gone], dv[:, gone], dbias[gone]):
        assert not grad.any()


@every_place
@pytest.mark.parametrize("how", ["mask", "additive", "boolean"])
def test_rows_that_see_nothing(backend: str, device: str, how: str) -> None:
    """Result 0, lse -inf, gradients 0 and no NaN anywhere, also in the rows beside them."""
    q, k, v = leaf(2, 60, 2, 16, device=device), leaf(2, 20, 2, 16, device=device), leaf(2, 20, 2, 16, device=device)
    row = torch.arange(60, device=device)[:, None]
    seen = (torch.arange(20, device=device) <= row - 40).expand(60, 20)
    features = {
        "mask": {"mask": Causal()},
        "additive": {"bias": torch.zeros(60, 20, device=device).masked_fill(~seen, -torch.inf)},
        "boolean": {"bias": seen},
    }[how]
    out, lse = flashtile.attention(q, k, v, return_lse=True, backend=backend, **features)
    assert not out[:, :40].any()
    assert (lse[..., :40] == -torch.inf).all()
    assert torch.isfinite(lse[..., 40:]).all()
    dq, dk, dv = gradients(out, lse, q, k, v)
    assert not dq[:, :40].any()
    assert all(torch.isfinite(grad).all() for grad in (dq, dk, dv))
    expected = flashtile.attention(q[:, 40:], k, v, causal=True, backend=backend)
    torch.testing.assert_close(out[:, 40:], expected)


@every_place
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_nothing_leaks_from_behind_the_last_sequence(backend: str, device: str, garbage: float) -> None:
    """Padding of a packed batch may hold anything; so may the gradient that arrives for it."""
    chosen = case("varlen-trailing")
    inputs = build(chosen, torch.float32, device)
    clean = evaluate(chosen, inputs, backend)
    for tensor in (inputs.q, inputs.k, inputs.v, inputs.dout):
        tensor[-chosen.trailing :] = garbage
    assert inputs.dlse is not None
    inputs.dlse[:, -chosen.trailing :] = garbage
    for name, result in evaluate(chosen, inputs, backend).items():
        assert torch.equal(result, clean[name]), name


@every_place
def test_without_any_key_only_rows_of_a_sequence_have_the_sink(backend: str, device: str) -> None:
    q, k, sinks = leaf(5, 2, 4, device=device), leaf(0, 2, 4, device=device), leaf(2, device=device)
    starts = [torch.tensor(ends, dtype=torch.int32, device=device) for ends in ([0, 3], [0, 0])]
    out, lse = flashtile.attention_varlen(q, k, k, *starts, 3, 0, sinks=sinks, return_lse=True, backend=backend)
    assert not out.any()
    assert torch.equal(lse[:, :3], sinks[:, None].expand(2, 3))
    assert (lse[:, 3:] == -torch.inf).all()
    garbage = torch.ones_like(lse).index_fill(1, torch.tensor([4], device=device), torch.nan)
    assert torch.equal(torch.autograd.grad(lse, sinks, garbage)[0], torch.full_like(sinks, 3.0))


@every_place
def test_nothing_leaks_between_sequences(backend: str, device: str) -> None:
    """NaN in one packed sequence stays in it; so does NaN in one batch entry or head of a dense call."""
    chosen = case("varlen-cross")
    inputs = build(chosen, torch.float32, device)
    clean = evaluate(chosen, inputs, backend)
    for tensor in (inputs.q, inputs.k, inputs.v):
        tensor[: 5 if tensor is inputs.q else 70] = torch.nan
    poisoned = evaluate(chosen, inputs, backend)
    for name, first in (("out", 5), ("dq", 5), ("dk", 70), ("dv", 70)):
        assert torch.equal(poisoned[name][first:], clean[name][first:]), name
    assert torch.isnan(poisoned["out"][:5]).all()
    q, k, v = (torch.randn(2, 40, 2, 16, device=device) for _ in range(3))
    before = flashtile.attention(q, k, v, backend=backend)
    k[0, :, 1] = torch.nan
    after = flashtile.attention(q, k, v, backend=backend)
    assert isinstance(before, Tensor)
    assert isinstance(after, Tensor)
    assert torch.equal(after[1], before[1])
    assert torch.equal(after[0, :, 0], before[0, :, 0])
    assert torch.isnan(after[0, :, 1]).all()


@every_place
@every_dtype
@pytest.mark.parametrize("name", ["dim-59", "causal-few-queries"])
def test_nothing_leaks_from_memory_around_the_tensors(backend: str, device: str, dtype: torch.dtype, name: str) -> None:
    """Tiles overhang lengths and head dims; what lies there in memory, NaN, must not come in, nor be overwritten."""
    chosen = case(name)
    inputs = build(chosen, dtype, device)
    clean = evaluate(chosen, inputs, backend)
    surrounded = {field: within_nan(getattr(inputs, field)) for field in ("q", "k", "v", "dout")}
    for field, result in evaluate(chosen, inputs._replace(**surrounded), backend).items():
        torch.testing.assert_close(result, clean[field], rtol=1e-2, atol=1e-2)
    for view in surrounded.values():
        outside = torch.isnan(view._base).sum() if view._base is not None else 0
        assert int(outside) == view._base.numel() - view.numel()


def within_nan(tensor: Tensor) -> Tensor:
    """The same values as a view into a larger buffer of NaN, with rows, heads and dims of NaN on every side."""
    buffer = torch.full([size + 6 for size in tensor.shape], torch.nan, dtype=tensor.dtype, device=tensor.device)
    view = buffer[tuple(slice(3, 3 + size) for size in tensor.shape)]
    view.copy_(tensor)
    return view


@every_place
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("field", ["q", "k", "v"])
@pytest.mark.parametrize("mask", [None, Causal(), Window(5, 0)], ids=str)
def test_what_is_seen_and_not_finite_acts_as_in_standard_attention(
    backend: str, device: str, field: str, value: float, mask: Causal | None
) -> None:
    """In key 50 of 100: the rows that see it are NaN or infinite just where standard attention is.

    Rows that do not see it have its score replaced by -inf, so q and k never leak into them. A hidden v may: its weight
    0 times NaN is NaN, in standard attention always, here where its tile is computed at all.
    """
    chosen = Case("nan", "", batch=1, q_len=100, k_len=100, dim=16, mask=mask)
    inputs = build(chosen, torch.float32, device)
    clean = evaluate(chosen, inputs, backend, grads=False)
    getattr(inputs, field)[0, 50, 0, 3] = value
    results = evaluate(chosen, inputs, backend, grads=False)
    standard = evaluate(chosen, inputs, None, grads=False)
    seeing = {None: slice(0, 100), Causal(): slice(50, 100), Window(5, 0): slice(50, 56)}[mask]
    if field == "q":
        seeing = slice(50, 51)
    check_same_nonfinite("out", results["out"][:, seeing], standard["out"][:, seeing].double())
    if math.isnan(value):
        check_same_nonfinite("lse", results["lse"][..., seeing], standard["lse"][..., seeing].double())
    assert not torch.isfinite(results["out"][:, seeing, 0]).all()
    if field != "v":
        for outside in (slice(0, seeing.start), slice(seeing.stop, 100)):
            assert torch.equal(results["out"][:, outside], clean["out"][:, outside])
    assert torch.equal(results["out"][:, :, 1], clean["out"][:, :, 1])


@every_place
def test_scores_may_be_shifted(backend: str, device: str) -> None:
    """A constant added to a row's scores changes its lse by itself and nothing else."""
    shifted = dataclasses.replace(case("bias-queries"), dlse=False)
    inputs = build(shifted, torch.float32, device)
    assert inputs.bias is not None
    results = evaluate(shifted, inputs, backend)
    without = evaluate(dataclasses.replace(shifted, bias=None), inputs._replace(bias=None), backend)
    torch.testing.assert_close(results["out"], without["out"])
    torch.testing.assert_close(results["lse"], without["lse"] + inputs.bias.squeeze(-1))
    torch.testing.assert_close(results["dbias"], torch.zeros_like(results["dbias"]), rtol=0, atol=1e-5)


@every_place
def test_far_keys_of_alibi_cost_near_ones_no_digits(backend: str, device: str) -> None:
    """The first tiles' scores lie near -1000: what is taken relative to them loses the digits of a score near 0."""
    chosen = Case("alibi-far", "", batch=1, q_len=1024, k_len=1024, dim=16, heads=2, kv_heads=2)
    inputs = build(chosen, torch.float32, device)
    slopes = torch.tensor([2.0, 0.5], device=device)

    def attend(dtype: torch.dtype, backend: str) -> Tensor:
        q, k, v = (tensor.detach().to(dtype) for tensor in (inputs.q, inputs.k, inputs.v))
        out = flashtile.attention(q, k, v, alibi_slopes=slopes.to(dtype), causal=True, backend=backend)
        assert isinstance(out, Tensor)
        return out

    torch.testing.assert_close(
        attend(torch.float32, backend).double(), attend(torch.float64, "reference"), rtol=0, atol=2e-6
    )
