"""flash_attn.layers.rotary: each pair a complex number that is turned, forward, backward and in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.integrations.flash_attn.rotary import (
    ApplyRotaryEmb,
    ApplyRotaryEmbKV_,
    ApplyRotaryEmbQKV_,
    RotaryEmbedding,
    apply_rotary,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)

POSITIONS, HALF, DIM = 9, 3, 8
ANGLES = torch.rand(POSITIONS, HALF, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 6
TABLES = ANGLES.cos(), ANGLES.sin()

both = pytest.mark.parametrize("interleaved", [False, True])
# Dynamo makes an object of an autograd.Function, and asks a tensor that is no leaf for its grad.
of_dynamo = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute:UserWarning"
)


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def turned(x: Tensor, positions: list[list[int]], interleaved: bool, angles: Tensor = ANGLES) -> Tensor:
    """x (batch, seqlen, heads, DIM), token i of sequence b at positions[b][i]; -1 leaves it as it is."""
    rows = [torch.stack([token(t, p, interleaved, angles) for t, p in zip(row, places, strict=True)])
            for row, places in zip(x, positions, strict=True)]  # fmt: skip
    return torch.stack(rows)


def token(x: Tensor, position: int, interleaved: bool, angles: Tensor) -> Tensor:
    if position < 0:
        return x
    a, b = (x[:, 0 : 2 * HALF : 2], x[:, 1 : 2 * HALF : 2]) if interleaved else (x[:, :HALF], x[:, HALF : 2 * HALF])
    product = torch.complex(a, b) * torch.polar(torch.ones(HALF).double(), angles[position])
    parts = (product.real, product.imag)
    front = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([front, x[:, 2 * HALF :]], -1)


CASES: dict[str, tuple[dict[str, Any], list[list[int]]]] = {
    "from-the-start": ({}, [[0, 1, 2, 3]] * 2),
    "offset": ({"seqlen_offsets": 5}, [[5, 6, 7, 8]] * 2),
    "offsets": ({"seqlen_offsets": torch.tensor([4, 0], dtype=torch.int32)}, [[4, 5, 6, 7], [0, 1, 2, 3]]),
    "offsets-beyond-the-tables": ({"seqlen_offsets": torch.tensor([7, 1])}, [[7, 8, -1, -1], [1, 2, 3, 4]]),
}


@both
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name: str, interleaved: bool, inplace: bool) -> None:
    options, positions = CASES[name]
    x, dout = randn(2, 4, 3, DIM).requires_grad_(), randn(2, 4, 3, DIM)
    before = x.detach().clone().requires_grad_()
    expected = turned(before, positions, interleaved)
    out = apply_rotary_emb(x, *TABLES, interleaved, inplace, **options)
    torch.testing.assert_close(out, expected)
    assert (out.data_ptr() == x.data_ptr()) is inplace
    torch.testing.assert_close(x, expected if inplace else before)
    given = dout.clone()
    torch.testing.assert_close(torch.autograd.grad(out, x, given), torch.autograd.grad(expected, before, dout))
    assert torch.equal(given, dout)  # the incoming gradient is somebody else's


@both
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offsets", [0, 2, torch.tensor([1, 0, 4])])
def test_packed_sequences(offsets: int | Tensor, interleaved: bool, inplace: bool) -> None:
    starts = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    x, dout = randn(9, 2, DIM).requires_grad_(), randn(9, 2, DIM)  # two tokens belong to no sequence
    first, _, third = [offsets] * 3 if isinstance(offsets, int) else offsets.tolist()
    positions = [[*range(first, first + 3), *range(third, third + 4), -1, -1]]
    before = x.detach().clone().requires_grad_()
    expected = turned(before[None], positions, interleaved)[0]
    out = apply_rotary_emb(x, *TABLES, interleaved, inplace, offsets, cu_seqlens=starts, max_seqlen=4)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, x, dout), torch.autograd.grad(expected, before, dout))


@both
@pytest.mark.parametrize("form", ["packed", "heads", "separate-tables"])
def test_qkv_in_place(form: str, interleaved: bool) -> None:
    of_keys = ANGLES.flip(0) if form == "separate-tables" else ANGLES
    shape, heads = ((3, 2), None) if form != "heads" else ((4 + 2 * 2,), 4)
    qkv, dout = randn(2, 4, *shape, DIM).requires_grad_(), randn(2, 4, *shape, DIM)
    before = qkv.detach().clone().requires_grad_()
    q, k, v = before.unbind(2) if heads is None else before.split((4, 2, 2), 2)
    positions = [[1, 2, 3, 4]] * 2
    parts = [turned(q, positions, interleaved), turned(k, positions, interleaved, of_keys), v]
    expected = torch.stack(parts, 2) if heads is None else torch.cat(parts, 2)
    keys = (of_keys.cos(), of_keys.sin()) if form == "separate-tables" else (None, None)
    out = apply_rotary_emb_qkv_(qkv, *TABLES, *keys, interleaved, 1, heads)
    assert out.data_ptr() == qkv.data_ptr()
    torch.testing.assert_close(out, expected)
    given = dout.clone()
    torch.testing.assert_close(torch.autograd.grad(out, qkv, given), torch.autograd.grad(expected, before, dout))
    assert torch.equal(given, dout)


@both
def test_kv_in_place(interleaved: bool) -> None:
    kv, dout = randn(2, 4, 2, 3, DIM).requires_grad_(), randn(2, 4, 2, 3, DIM)
    before = kv.detach().clone().requires_grad_()
    offsets = torch.tensor([2, 0])
    k = turned(before[:, :, 0], [[2, 3, 4, 5], [0, 1, 2, 3]], interleaved)
    expected = torch.stack([k, before[:, :, 1]], 2)
    out = apply_rotary_emb_kv_(kv, *TABLES, interleaved, offsets)
    assert out.data_ptr() == kv.data_ptr()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(torch.autograd.grad(out, kv, dout), torch.autograd.grad(expected, before, dout))


@of_dynamo
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("together", [False, True], ids=["q-and-kv", "qkv"])
def test_parts_of_one_projection_are_turned_in_place(together: bool, compiled: bool) -> None:
    """q and kv of one tensor are turned one after the other, as modules with grouped heads do, and then trained."""
    projection = torch.nn.Linear(5, (4 + 2 * 2) * DIM).double()
    x = randn(2, 4, 5)

    def in_place(x: Tensor) -> Tensor:
        heads = projection(x).unflatten(-1, (-1, DIM))
        if together:
            return apply_rotary_emb_qkv_(heads, *TABLES, num_heads_q=4)
        q = apply_rotary_emb(heads[:, :, :4], *TABLES, inplace=True)
        kv = apply_rotary_emb_kv_(heads[:, :, 4:].unflatten(2, (2, 2)), *TABLES)
        return torch.cat([q, kv.flatten(2, 3)], 2)

    attempt = torch.compile(in_place, fullgraph=True, backend="aot_eager") if compiled else in_place
    q, k, v = projection(x).unflatten(-1, (-1, DIM)).split((4, 2, 2), 2)
    places = [[0, 1, 2, 3]] * 2
    expected = torch.cat([*(turned(t, places, False) for t in (q, k)), v], 2)
    out = attempt(x)
    torch.testing.assert_close(out, expected)
    given = torch.randn_like(out)
    (dweight,), (wanted,) = (torch.autograd.grad(result, projection.weight, given) for result in (out, expected))
    torch.testing.assert_close(dweight, wanted)


@of_dynamo
@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_first_used_in_inference_mode_can_be_trained(compiled: bool) -> None:
    projection = torch.nn.Linear(5, 3 * 2 * DIM)
    module = RotaryEmbedding(2 * HALF)

    def turn(x: Tensor) -> Tensor:
        return module(projection(x).unflatten(-1, (3, 2, DIM)))

    attempt = torch.compile(turn, backend="aot_eager") if compiled else turn
    with torch.inference_mode():
        expected = turn(torch.ones(1, 4, 5))
    found = attempt(torch.ones(1, 4, 5))
    torch.testing.assert_close(found, expected)
    found.sum().backward()
    assert projection.weight.grad is not None


@both
def test_plain_forms(interleaved: bool) -> None:
    x = randn(2, 4, 3, DIM)
    expected = turned(x, [[0, 1, 2, 3]] * 2, interleaved)
    cos, sin = (table[:4] for table in TABLES)
    torch.testing.assert_close(apply_rotary_emb_torch(x, cos, sin, interleaved), expected)
    torch.testing.assert_close(
        apply_rotary_emb_torch(x, cos.expand(2, -1, -1), sin.expand(2, -1, -1), interleaved), expected
    )
    torch.testing.assert_close(apply_rotary(expected, *TABLES, interleaved=interleaved, conjugate=True), x)
    assert apply_rotary_emb_func is apply_rotary_emb
    quarter = torch.zeros(4, DIM // 2), torch.ones(4, DIM // 2)
    torch.testing.assert_close(rotate_half(x, interleaved), apply_rotary(x, *quarter, interleaved=interleaved))
    with pytest.raises(ValueError, match="cos: got 10 rotated elements"):
        apply_rotary_emb_torch(x, torch.zeros(4, 5), torch.zeros(4, 5))


def test_rounded_once_in_half_precision() -> None:
    x, cos, sin = randn(2, 4, 3, DIM).bfloat16(), *(table.bfloat16() for table in TABLES)
    exact = apply_rotary_emb(x.double(), cos.double(), sin.double())
    out = apply_rotary_emb(x, cos, sin)
    assert out.dtype == torch.bfloat16
    assert (out != exact.bfloat16()).double().mean() < 0.01


def test_autograd_classes_take_positional_arguments() -> None:
    x = randn(2, 4, 3, DIM)
    expected = apply_rotary_emb(x, *TABLES, True)
    assert torch.equal(ApplyRotaryEmb.apply(x, *TABLES, True, False, 0, None, None), expected)
    qkv = torch.stack([x, x, x], 2)
    assert torch.equal(ApplyRotaryEmbQKV_.apply(qkv, *TABLES, None, None, True, 0, None)[:, :, 1], expected)
    assert torch.equal(ApplyRotaryEmbKV_.apply(torch.stack([x, x], 2), *TABLES, True, 0)[:, :, 0], expected)


BAD: dict[str, tuple[Any, str]] = {
    "rank": (lambda: apply_rotary_emb(randn(4, 3, DIM), *TABLES), "x: got shape (4, 3, 8)"),
    "wide": (lambda: apply_rotary_emb(randn(1, 4, 3, 4), *TABLES), "cos: got shape (9, 3)"),
    "sin": (lambda: apply_rotary_emb(randn(1, 4, 3, DIM), TABLES[0], TABLES[1][:4]), "sin: got shape (4, 3)"),
    "long": (lambda: apply_rotary_emb(randn(1, 10, 3, DIM), *TABLES), "cos: got 9 positions, expected at least 10"),
    "offset": (lambda: apply_rotary_emb(randn(1, 4, 3, DIM), *TABLES, seqlen_offsets=6), "expected at least 10"),
    "offsets": (
        lambda: apply_rotary_emb(randn(1, 4, 3, DIM), *TABLES, seqlen_offsets=torch.tensor([1, 2])), "seqlen_offsets:",
    ),
    "no-max": (lambda: apply_rotary_emb(randn(4, 3, DIM), *TABLES, cu_seqlens=torch.tensor([0, 4])), "max_seqlen: got"),
    "qkv": (lambda: apply_rotary_emb_qkv_(randn(1, 4, 2, 3, DIM), *TABLES), "qkv: got shape"),
    "qkv-rank": (lambda: apply_rotary_emb_qkv_(randn(4, 3, DIM), *TABLES), "qkv: got shape"),
    "heads": (lambda: apply_rotary_emb_qkv_(randn(1, 4, 6, DIM), *TABLES), "num_heads_q: got None"),
    "odd-heads": (lambda: apply_rotary_emb_qkv_(randn(1, 4, 6, DIM), *TABLES, num_heads_q=3), "num_heads_q: got 3"),
    "kv": (lambda: apply_rotary_emb_kv_(randn(1, 4, 3, 3, DIM), *TABLES), "kv: got shape"),
    "module": (lambda: RotaryEmbedding(6)(randn(1, 4, 3, 2, DIM), seqlen_offset=torch.tensor([1])), "max_seqlen: got"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_are_named(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value)


@both
@pytest.mark.parametrize("scale_base", [None, 16.0])
@pytest.mark.parametrize("offset", [0, 3])
def test_module(scale_base: float | None, interleaved: bool, offset: int) -> None:
    """Angles position * base**(-2 i / dim); xPos multiplies q and divides k by the same decay."""
    module = RotaryEmbedding(2 * HALF, base=100.0, interleaved=interleaved, scale_base=scale_base)
    qkv = torch.randn(2, 4, 3, 2, DIM)
    length = 4 + offset
    position = torch.arange(length).double()[:, None]
    angles = position * 100.0 ** -(torch.arange(0, 2 * HALF, 2).double() / (2 * HALF))
    pair = torch.arange(0, 2 * HALF, 2).double()
    decay = torch.ones(length, HALF).double()
    if scale_base is not None:
        decay = ((pair + 0.4 * 2 * HALF) / (1.4 * 2 * HALF)) ** ((position - length // 2) / scale_base)
    q, k, v = qkv.double().unbind(2)
    places = [list(range(offset, length))] * 2
    expected = []
    for x, scale in ((q, decay), (k, 1 / decay)):
        full = torch.ones(length, DIM).double()
        full[:, : 2 * HALF] = scale.repeat_interleave(2, -1) if interleaved else torch.cat([scale, scale], -1)
        expected.append(turned(x, places, interleaved, angles) * full[offset:, None])
    wanted = torch.stack([*expected, v], 2).float()
    apart = qkv.clone()
    out = module(qkv, seqlen_offset=offset)
    assert out.data_ptr() == qkv.data_ptr()
    torch.testing.assert_close(out, wanted)
    q_out, kv_out = module(apart[:, :, 0].clone(), apart[:, :, 1:].clone(), seqlen_offset=offset)
    torch.testing.assert_close(torch.cat([q_out[:, :, None], kv_out], 2), wanted)
    assert [name for name, _ in module.named_buffers()] == (
        ["inv_freq"] if scale_base is None else ["inv_freq", "scale"]
    )
    assert not module.state_dict()


def test_module_keeps_its_tables_and_makes_new_ones_when_it_must() -> None:
    module = RotaryEmbedding(2 * HALF).bfloat16()
    module(torch.randn(1, 4, 3, 2, DIM))
    first = module._cos_cached
    torch.testing.assert_close(first, torch.outer(torch.arange(4.0), 1e4 ** -(torch.arange(0, 6, 2) / 6)).cos())
    module(torch.randn(1, 3, 3, 2, DIM))
    assert module._cos_cached is first
    module(torch.randn(1, 2, 3, 2, DIM), seqlen_offset=torch.tensor([6]), max_seqlen=8)
    assert module._cos_cached.shape[0] == 8
    module(torch.randn(1, 4, 3, 2, DIM).bfloat16())
    assert module._cos_cached.dtype == torch.bfloat16
    plain = RotaryEmbedding(2 * HALF)
    plain.inv_freq.mul_(0.5)  # as those do who stretch positions
    plain(torch.randn(1, 4, 3, 2, DIM))
    torch.testing.assert_close(plain._cos_cached, torch.outer(torch.arange(4.0), plain.inv_freq).cos())
