"""The native calls: shapes, masks, features, defaults, lse, out=, autocast, and inputs without elements."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import alibi, band, close, gradients, standard
from torch import Tensor

import flashtile
from flashtile import masks, ops
from flashtile.problem import Call


def randn(*shape: int, grad: bool = True, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=grad)


def qkv(q_len: int = 5, k_len: int = 7, v_dim: int = 8) -> list[Tensor]:
    """Two batches of four query heads over two key-value heads."""
    return [randn(2, q_len, 4, 8), randn(2, k_len, 2, 8), randn(2, k_len, 2, v_dim)]


def check(options: dict[str, Any], expected: dict[str, Any], leaves: list[Tensor] | None = None) -> None:
    """out, lse and every gradient against the definition; options and expected may hold leaves of their own."""
    q, k, v = leaves = qkv() if leaves is None else leaves
    out, lse = flashtile.attention(q, k, v, **options, return_lse=True)
    results = standard(q, k, v, **expected)
    close((out, lse), results)
    assert torch.equal(flashtile.attention(q, k, v, **options), out)
    more = [t for t in options.values() if isinstance(t, Tensor) and t.requires_grad]
    # A row that sees nothing has lse -inf in both; its gradient is nobody's business.
    upstream = [torch.randn_like(out), torch.randn_like(lse).masked_fill(lse == -torch.inf, 0.0)]
    close(gradients((out, lse), leaves + more, upstream), gradients(results, leaves + more, upstream))


@pytest.mark.parametrize("v_dim", [1, 8, 13])
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 9), (5, 7), (7, 5), (33, 65)])
def test_plain(q_len: int, k_len: int, v_dim: int) -> None:
    check({}, {}, qkv(q_len, k_len, v_dim))
    check({"causal": True}, {"seen": band(q_len, k_len, None, 0)}, qkv(q_len, k_len, v_dim))


WINDOWS = [(0, 0), (2, 1), (None, 1), (2, None), (-1, 1), (2, -1), (None, None), (-1, -1), (100, 100)]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_window(window: tuple[int | None, int | None]) -> None:
    left, right = (None if side == -1 else side for side in window)
    check({"window": window}, {"seen": band(5, 7, left, right)})


@pytest.mark.parametrize(
    "window", [[2, 1], torch.tensor([2, 1]), (np.int64(2), np.int32(1))], ids=["list", "tensor", "numpy"]
)
def test_forms_of_a_window(window: Any) -> None:
    check({"window": window}, {"seen": band(5, 7, 2, 1)})


def seen_by_rule(rule: Any, q_len: int = 5, k_len: int = 7) -> Tensor:
    """The mask of a rule over (position of the row, key), element by element."""
    rows = range(k_len - q_len, k_len)
    return torch.tensor([[bool(rule(position, key)) for key in range(k_len)] for position in rows])


MASKS: dict[str, tuple[masks.Mask, Any]] = {
    "full": (masks.Full(), lambda i, j: True),
    "causal": (masks.Causal(), lambda i, j: j <= i),
    "window": (masks.Window(2, 1), lambda i, j: i - 2 <= j <= i + 1),
    "prefix": (masks.Prefix(4), lambda i, j: j < 4 or j <= i),
    "chunked": (masks.Chunked(3), lambda i, j: i // 3 == j // 3),
    "chunked-overlap": (masks.Chunked(3, 1), lambda i, j: i // 3 * 3 - 1 <= j < i // 3 * 3 + 4),
    "documents": (masks.Documents((3, 4)), lambda i, j: (i < 3) == (j < 3)),
    "documents-causal": (masks.Documents((3, 4)) & masks.Causal(), lambda i, j: (i < 3) == (j < 3) and j <= i),
    "prefix-window": (masks.Prefix(4) & masks.Window(3, None), lambda i, j: (j < 4 or j <= i) and j >= i - 3),
    "both-bands": (masks.Window(3, 2) & masks.Window(1, None), lambda i, j: i - 1 <= j <= i + 2),
}


@pytest.mark.parametrize("mask", MASKS)
def test_mask(mask: str) -> None:
    given, rule = MASKS[mask]
    check({"mask": given}, {"seen": seen_by_rule(rule)})
    check({"mask": given, "causal": True, "window": (2, -1)},
          {"seen": seen_by_rule(lambda i, j: rule(i, j) and i - 2 <= j <= i)})  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_intervals(dtype: torch.dtype) -> None:
    lo = torch.tensor([[0, 0, 1, 2, 2], [0, 3, 3, 3, 7]], dtype=dtype)
    hi = torch.tensor([[1, 1, 3, 7, 9], [2, 3, 5, 6, 7]], dtype=dtype)  # 9 is behind the last key: it counts as 7
    keys = torch.arange(7)
    seen = (keys >= lo[..., None]) & (keys < hi[..., None])
    check({"mask": masks.Intervals(lo, hi)}, {"seen": seen[:, None]})
    check({"mask": masks.Intervals(lo[0], hi[0])}, {"seen": seen[0]})


BIAS_SHAPES = [(7,), (5, 7), (1, 7), (5, 1), (4, 5, 7), (4, 1, 1), (2, 1, 1, 7), (2, 4, 5, 7), (1, 1, 1, 1), ()]


@pytest.mark.parametrize("shape", BIAS_SHAPES, ids=str)
def test_bias(shape: tuple[int, ...]) -> None:
    additive = randn(*shape)
    check({"bias": additive}, {"added": additive})
    boolean = torch.rand(shape) > 0.3
    check({"bias": boolean}, {"seen": boolean})


def test_features_together() -> None:
    slopes, bias, sinks = torch.rand(2, 4, dtype=torch.float64), randn(4, 5, 7), randn(4)
    check(
        {"alibi_slopes": slopes, "bias": bias, "sinks": sinks, "softcap": 1.5, "scale": 0.7, "window": (3, 1)},
        {"added": alibi(slopes, 5, 7) + bias, "sinks": sinks, "softcap": 1.5, "scale": 0.7, "seen": band(5, 7, 3, 1)},
    )
    check({"alibi_slopes": slopes[0]}, {"added": alibi(slopes[0], 5, 7)})
    check({"softcap": 0.8}, {"softcap": 0.8})
    # With sinks a row that sees no key still has a denominator: its lse is the sink.
    check({"sinks": sinks, "causal": True}, {"sinks": sinks, "seen": band(7, 5, None, 0)}, qkv(7, 5))


def test_numbers_of_any_kind() -> None:
    leaves = qkv()
    expected = flashtile.attention(*leaves, scale=1.0, softcap=2.0)
    for scale, softcap in ((1, 2), (np.float32(1), np.int64(2)), (np.float64(1), 2)):
        assert torch.equal(flashtile.attention(*leaves, scale=scale, softcap=softcap), expected)


def test_defaults() -> None:
    leaves = qkv()
    explicit = {
        "mask": None, "causal": False, "window": None, "scale": 1 / math.sqrt(8), "softcap": 0.0, "alibi_slopes": None,
        "bias": None, "sinks": None, "dropout_p": 0.0, "return_lse": False, "deterministic": None, "out": None,
        "backend": None,
    }  # fmt: skip
    assert torch.equal(flashtile.attention(*leaves), flashtile.attention(*leaves, **explicit))


def test_three_dimensions_are_one_head() -> None:
    q, k, v = randn(2, 5, 8), randn(2, 7, 8), randn(2, 7, 6)
    out, lse = flashtile.attention(q, k, v, causal=True, return_lse=True)
    expected, expected_lse = flashtile.attention(*(t.unsqueeze(2) for t in (q, k, v)), causal=True, return_lse=True)
    assert out.shape == (2, 5, 6)
    assert lse.shape == (2, 5)
    assert torch.equal(out, expected.squeeze(2))
    assert torch.equal(lse, expected_lse.squeeze(1))
    into = torch.zeros(2, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        returned = flashtile.attention(q, k, v, causal=True, out=into)
    assert returned.data_ptr() == into.data_ptr()
    assert torch.equal(into, out)


def test_two_dimensions_are_one_head_of_packed_sequences() -> None:
    q, starts = randn(6, 8), torch.tensor([0, 2, 6], dtype=torch.int32)
    out, lse = flashtile.attention_varlen(q, q, q, starts, return_lse=True)
    expected, expected_lse = flashtile.attention_varlen(*[q.unsqueeze(1)] * 3, starts, starts, 4, 4, return_lse=True)
    assert out.shape == (6, 8)
    assert lse.shape == (6,)
    close((out, lse), (expected.squeeze(1), expected_lse.squeeze(0)))
    into = torch.zeros(6, 8, dtype=torch.float64)
    with torch.no_grad():
        flashtile.attention_varlen(q, q, q, starts, out=into)
    close(into, out)


@pytest.mark.parametrize("mask", MASKS)
def test_varlen_aligns_masks_per_sequence(mask: str) -> None:
    q, k, v = randn(8, 4, 8), randn(9, 2, 8), randn(9, 2, 8)
    q_ends, k_ends = [0, 5, 5, 8], [0, 7, 9, 9]
    starts = [torch.tensor(ends, dtype=torch.int32) for ends in (q_ends, k_ends)]
    out, lse = flashtile.attention_varlen(q, k, v, *starts, mask=MASKS[mask][0], return_lse=True)
    alone = flashtile.attention(q[None, :5], k[None, :7], v[None, :7], mask=MASKS[mask][0], return_lse=True)
    close((out[:5], lse[:, :5]), (alone[0][0], alone[1][0]))
    assert not bool(out[5:].any())
    assert bool((lse[:, 5:] == -torch.inf).all())


def test_lse_is_differentiable_through_a_merge() -> None:
    q, k, v = leaves = qkv()
    parts = [flashtile.attention(q, k[:, s], v[:, s], return_lse=True) for s in (slice(0, 3), slice(3, 7))]
    merged = flashtile.merge_states(*map(list, zip(*parts, strict=True)))
    whole = flashtile.attention(q, k, v, return_lse=True)
    close(merged, whole)
    standards = standard(q, k, v)
    upstream = [torch.randn_like(t) for t in whole]
    close(gradients(merged, leaves, upstream), gradients(standards, leaves, upstream))
    lse = flashtile.attention(q, k, v, return_lse=True)[1]
    close(gradients((lse,), leaves, upstream[1:]), gradients((standard(q, k, v)[1],), leaves, upstream[1:]))


@pytest.mark.parametrize("out", [
    torch.zeros(2, 5, 4, 8),
    torch.zeros(2, 4, 5, 8).transpose(1, 2),
    torch.zeros(2, 5, 4, 17)[..., 1::2],
    torch.zeros(2, 5, 3, 4, 8)[:, :, 1],
], ids=["contiguous", "heads-first", "every-second", "packed"])  # fmt: skip
@pytest.mark.parametrize("return_lse", [False, True])
def test_out_is_written_and_returned(out: Tensor, return_lse: bool) -> None:
    leaves = [t.detach().float() for t in qkv()]
    out.fill_(torch.nan)
    expected = flashtile.attention(*leaves, return_lse=return_lse)
    returned = flashtile.attention(*leaves, out=out, return_lse=return_lse)
    for got, want in zip(*((r if return_lse else (r,)) for r in (returned, expected)), strict=True):
        torch.testing.assert_close(got, want)
    assert (returned[0] if return_lse else returned) is out


def test_out_where_no_gradient_is_recorded() -> None:
    q, k, v = (t.float().detach().requires_grad_() for t in qkv())
    expected = flashtile.attention(q, k, v)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(flashtile.attention(q, k, v, out=torch.empty(2, 5, 4, 8)), expected)


def test_out_interleaved_with_the_inputs_of_one_buffer() -> None:
    # q, k, v and the result as columns of one array: no byte is shared, though their address ranges overlap.
    buffer = torch.randn(2, 5, 4, 4, 8)
    q, k, v, out = buffer.unbind(2)
    expected = flashtile.attention(q.clone(), k.clone(), v.clone())
    flashtile.attention(q, k, v, out=out)
    torch.testing.assert_close(out, expected)
    with pytest.raises(ValueError, match="out: got memory that overlaps k"):
        flashtile.attention(q, k, v, out=torch.as_strided(buffer, q.shape, q.stride(), k.storage_offset() + 8))


def test_result_keeps_the_order_of_q_in_memory() -> None:
    k = torch.randn(2, 7, 4, 8)
    for q in (
        torch.randn(2, 5, 4, 8),
        torch.randn(2, 4, 5, 8).transpose(1, 2),
        torch.randn(5, 2, 4, 8).transpose(0, 1),
    ):
        assert flashtile.attention(q, k, k).stride() == q.stride()
        wide = flashtile.attention(q, k, torch.randn(2, 7, 4, 16))
        assert wide.stride() == (*(2 * s for s in q.stride()[:-1]), 1)
    packed = torch.randn(2, 5, 3, 4, 8)
    assert flashtile.attention(*packed.unbind(2)).is_contiguous()


def test_autocast_casts_as_torch_does() -> None:
    q, k, v = (t.float().detach().requires_grad_() for t in qkv(7, 7))
    bias = torch.randn(7, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = flashtile.attention(q, k, v, bias=bias, return_lse=True)
        untouched = flashtile.attention(*(t.double() for t in (q, k, v)))
        half = flashtile.attention(*(t.half() for t in (q, k, v)))
        torchs = [F.scaled_dot_product_attention(*[q.to(dtype)] * 3).dtype for dtype in (torch.float64, torch.float16)]
        with torch.autocast("cpu", enabled=False):
            off = flashtile.attention(q, k, v)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert (untouched.dtype, half.dtype) == tuple(torchs) == (torch.float64, torch.bfloat16)
    assert off.dtype == torch.float32
    narrow = [t.bfloat16() for t in (q, k, v)]
    assert torch.equal(out, flashtile.attention(*narrow, bias=bias.bfloat16()))
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (q, k, v, bias))


SIZES = [s for s in itertools.product((0, 2), (0, 3), (0, 3), ((0, 0), (4, 2), (0, 2))) if 0 in (*s[:3], s[3][0])]


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_without_elements(size: tuple[int, int, int, tuple[int, int]], packed: bool) -> None:
    batch, q_len, k_len, (heads, kv_heads) = size
    q, k, v = randn(batch, q_len, heads, 8), randn(batch, k_len, kv_heads, 8), randn(batch, k_len, kv_heads, 6)
    sinks = randn(heads)
    if packed:
        starts = [torch.arange(batch + 1, dtype=torch.int32) * length for length in (q_len, k_len)]
        flat = (t.flatten(0, 1) for t in (q, k, v))
        out, lse = flashtile.attention_varlen(*flat, *starts, q_len, k_len, sinks=sinks, return_lse=True)
        assert out.shape == (batch * q_len, heads, 6)
        out, lse = out.unflatten(0, (batch, q_len)), lse.unflatten(1, (batch, q_len)).transpose(0, 1)
    else:
        out, lse = flashtile.attention(q, k, v, sinks=sinks, return_lse=True)
    assert out.shape == (batch, q_len, heads, 6)
    assert lse.shape == (batch, heads, q_len)
    assert not bool(out.any())
    close(lse, sinks[None, :, None].expand_as(lse))
    grads = gradients((out, lse), [q, k, v, sinks], [torch.randn_like(out), torch.ones_like(lse)])
    assert not any(bool(grad.any()) for grad in grads[:3])
    close(grads[3], torch.full((heads,), float(batch * q_len), dtype=torch.float64))


def test_deterministic_defaults_to_torchs_own_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = []
    attend = ops.attention

    def remember(call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        calls.append(call)
        return attend(call, out)

    monkeypatch.setattr(ops, "attention", remember)
    leaves = qkv()
    flashtile.attention(*leaves)
    torch.use_deterministic_algorithms(True)
    flashtile.attention(*leaves)
    flashtile.attention(*leaves, deterministic=False)
    assert [call.deterministic for call in calls] == [False, True, False]


def test_tensors_without_memory_have_shapes_and_gradients() -> None:
    q = torch.empty(2, 4, 5, 8, device="meta", requires_grad=True).transpose(1, 2)
    out, lse = flashtile.attention(q, q, q, causal=True, return_lse=True)
    assert (out.shape, out.stride(), lse.shape) == ((2, 5, 4, 8), q.stride(), (2, 4, 5))
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_inputs_stay_as_they_were() -> None:
    leaves = qkv()
    before = [t.detach().clone() for t in leaves]
    out = flashtile.attention(*leaves, causal=True)
    out.sum().backward()
    assert all(torch.equal(t, b) and t._version == 0 for t, b in zip(leaves, before, strict=True))


def test_a_wrong_definition_is_caught() -> None:
    with pytest.raises(AssertionError):
        check({"causal": True}, {"seen": band(5, 7, None, 1)})
    with pytest.raises(AssertionError):
        check({"scale": 0.5}, {})
