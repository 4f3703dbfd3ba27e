"""Every case on every backend in every dtype that it serves: out, lse and all gradients within the error budget."""

from __future__ import annotations

import dataclasses
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from places import GPU, PLACES_16_BIT, every_place, on_hopper
from torch import Tensor

import flashtile
from flashtile.masks import Intervals, Mask, Prefix, Window
from flashtile.testing import CASES, REAL_CASES, Case, build, case, evaluate, run_case
from flashtile.testing.accuracy import check_same_form

OTHERS = (torch.float16, torch.float32)
NARROW = (*OTHERS, torch.bfloat16)
HALF = (torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


every_dtype = pytest.mark.parametrize("dtype", [*NARROW, torch.float64], ids=dtype_name)
every_narrow_dtype = pytest.mark.parametrize("dtype", NARROW, ids=dtype_name)


def in_dtype(cases: tuple[Case, ...], dtype: torch.dtype) -> list[object]:
    return [pytest.param(case, dtype, id=f"{case}-{dtype_name(dtype)}") for case in cases]


def one_dtype_each(cases: tuple[Case, ...], dtypes: tuple[torch.dtype, ...] = NARROW) -> list[object]:
    """Each case in one dtype, by its name: every dtype meets every kind of feature, and fewer kernels are compiled."""
    return [in_dtype((case,), dtypes[zlib.crc32(case.id.encode()) % len(dtypes)])[0] for case in cases]


@every_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_on_the_cpu(backend: str, case: Case, dtype: torch.dtype) -> None:
    run_case(case, backend, dtype)


@pytest.mark.skipif(GPU, reason="this process compiles Triton kernels; the same cases run on the GPU")
@every_narrow_dtype
@pytest.mark.parametrize("case", [case for case in CASES if case.small], ids=str)
def test_in_tritons_interpreter(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "triton", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), one_dtype_each(CASES))
def test_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "triton", dtype, "cuda")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("case", "dtype"), one_dtype_each(CASES, HALF))
def test_on_hopper(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "hopper", dtype, "cuda")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("case", "dtype"), in_dtype(REAL_CASES, torch.bfloat16))
def test_real_sizes_on_hopper(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "hopper", dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("case", "dtype"), [*in_dtype(REAL_CASES, torch.bfloat16), *one_dtype_each(REAL_CASES, OTHERS)]
)
def test_real_sizes_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "triton", dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), one_dtype_each(CASES))
def test_plain_pytorch_operations_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "blocked", dtype, "cuda")


def test_the_table_of_cases() -> None:
    """Names are unique, reasons are given, and every mask class is there."""
    every = (*CASES, *REAL_CASES)
    assert len({case.id for case in every}) == len(every)
    assert all(case.why for case in every)
    tested = {type(part) for case in every for part in parts(case.mask)}
    family = {kind for kind in subclasses(Mask) if kind.__module__ == Mask.__module__}
    assert family <= tested


def parts(mask: Mask | None) -> list[Mask]:
    if mask is None:
        return []
    inner = [getattr(mask, name) for name in ("first", "second") if hasattr(mask, name)]
    return [mask, *(part for child in inner for part in parts(child))]


def subclasses(kind: type) -> set[type]:
    return {kind for child in kind.__subclasses__() for kind in (child, *subclasses(child))}


def test_equal_seeds_build_equal_inputs() -> None:
    first, second = (build(case("everything"), torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if isinstance(a, Tensor))
    assert not torch.equal(first.q, build(case("everything"), torch.float32, seed=1).q)


@pytest.mark.parametrize("layout", ["bhnd", "packed", "expanded", "strided"])
def test_layouts_are_what_they_say(layout: str) -> None:
    inputs = build(dataclasses.replace(case("square-64"), layout=layout), torch.float32)
    tensors = (inputs.q, inputs.k, inputs.v)
    assert not any(t.is_contiguous() for t in (tensors[1:] if layout == "expanded" else tensors))
    if layout == "packed":
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1


@every_place
@every_narrow_dtype
def test_out_is_written_in_place(backend: str, device: str, dtype: torch.dtype) -> None:
    """Also where its memory is ordered otherwise, and nothing around it is touched."""
    inputs = build(case("v-odd"), dtype, device)
    expected = evaluate(case("v-odd"), inputs, backend, grads=False)["out"]
    memory = torch.full((2, 2, 66, 20), torch.nan, dtype=dtype, device=device)
    out = memory.transpose(1, 2)[:, 1:65, :, 2:19]
    result = flashtile.attention(inputs.q, inputs.k, inputs.v, mask=case("v-odd").mask, out=out, backend=backend)
    assert result is out
    assert torch.equal(out, expected)
    assert int(torch.isnan(memory).sum()) == memory.numel() - out.numel()


@every_place
def test_forward_is_the_same_with_and_without_gradients(backend: str, device: str) -> None:
    inputs = build(case("gqa-causal-odd"), torch.float16, device)
    with_grads, without = (evaluate(case("gqa-causal-odd"), inputs, backend, grads) for grads in (True, False))
    for name, result in without.items():
        assert torch.equal(result, with_grads[name])


@every_place
@pytest.mark.parametrize("mask", [Window(20, 0), Prefix(9)], ids=str)
def test_a_gradient_that_nobody_wants_changes_no_other(backend: str, device: str, mask: Mask) -> None:
    q, k, v = (torch.randn(1, 40, 2, 16, device=device, requires_grad=True) for _ in range(3))
    dout = torch.randn(1, 40, 2, 16, device=device)
    out = flashtile.attention(q, k, v, mask=mask, backend=backend)
    assert isinstance(out, Tensor)
    wanted = torch.autograd.grad(out, (q, k, v), dout)
    for index, leaf in enumerate((q, k, v)):
        tensors = [t if t is leaf else t.detach() for t in (q, k, v)]
        out = flashtile.attention(*tensors, mask=mask, backend=backend)
        assert isinstance(out, Tensor)
        check_same_form("gradient", leaf, wanted[index])
        torch.testing.assert_close(torch.autograd.grad(out, leaf, dout)[0], wanted[index], rtol=0, atol=1e-6)


def spread(tensor: Tensor) -> Tensor:
    """The same numbers, each followed by another in memory."""
    return torch.stack([tensor, torch.full_like(tensor, 99)], -1)[..., 0]


@pytest.mark.parametrize(("backend", "device"), PLACES_16_BIT)
def test_small_tensors_may_have_any_strides(backend: str, device: str) -> None:
    """Slopes, sinks and cu_seqlens, which kernels read by address."""
    dtype = torch.float16 if backend == "hopper" else torch.float32
    q, k, v = (torch.randn(9, 2, 16, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    slopes, sinks = torch.rand(2, 2, device=device), torch.randn(2, device=device)
    starts, dout = (
        torch.tensor([0, 4, 9], dtype=torch.int32, device=device),
        torch.randn(9, 2, 16, device=device, dtype=dtype),
    )
    results = []
    for arrange in (torch.Tensor.contiguous, spread):
        leaves = (q, k, v, arrange(sinks).detach().requires_grad_())
        out = flashtile.attention_varlen(
            *leaves[:3], arrange(starts), None, 5, 5, alibi_slopes=arrange(slopes), sinks=leaves[3], backend=backend
        )
        assert isinstance(out, Tensor)
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    assert not spread(slopes).is_contiguous()
    for dense, strided in zip(*results, strict=True):
        torch.testing.assert_close(strided, dense, rtol=0, atol=1e-6)


ROWS = torch.arange(1, 41)
ALIKE: dict[str, list[dict[str, Any]]] = {
    "a table for all and one for each": [
        {"mask": Intervals(0 * ROWS, ROWS)},
        {"mask": Intervals(torch.zeros(2, 40).long(), torch.stack([ROWS, ROWS.clamp(max=9)]))},
    ],
    "slopes for all and for each": [{"alibi": "heads"}, {"alibi": "batch"}],
    "a bias for all and for each": [{"bias": "additive", "bias_axes": axes} for axes in ("1hqk", "bhqk", "b1qk")],
}


# Triton's interpreter remembers nothing.
@pytest.mark.parametrize(("backend", "device"), [place for place in PLACES_16_BIT if place.id != "triton-interpreted"])
@pytest.mark.parametrize("name", ALIKE)
def test_calls_that_differ_in_one_fact_are_told_apart(backend: str, device: str, name: str) -> None:
    """What is remembered of one call must not serve another: equal shapes, strides and features, in either order."""
    for features in (*ALIKE[name], *reversed(ALIKE[name])):
        alike = Case("alike", "", batch=2, q_len=40, k_len=40, dim=16, **features)
        run_case(alike, backend, torch.float16 if backend == "hopper" else torch.float32, device)


@pytest.mark.skipif(GPU, reason="kernels are compiled here, not interpreted")
def test_the_interpreter_rounds_bfloat16_as_a_gpu_does() -> None:
    """Against PyTorch's own cast, over values whose low bits decide: ties, near ties, infinities, tiny numbers."""
    import triton
    import triton.language as tl

    @triton.jit
    def cast(source, place, SIZE: tl.constexpr):
        index = tl.arange(0, SIZE)
        tl.store(place + index, tl.load(source + index).to(tl.bfloat16))

    bits = np.random.default_rng(0).integers(0, 2**31, 1024, dtype=np.int64).astype(np.int32)
    bits[:512] = bits[:512] & ~0xFFFF | 0x8000  # exact ties
    values = torch.from_numpy(bits).view(torch.float32).nan_to_num(1.0)
    values[:4] = torch.tensor([0.9999999, torch.inf, 1e-40, -3.0])
    place = torch.empty(1024, dtype=torch.bfloat16)
    cast[(1,)](values, place, 1024)
    assert torch.equal(place, values.bfloat16())
