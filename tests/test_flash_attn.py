"""The flash_attn 2.8 signatures: names and defaults exact, meaning as defined, packed gradients written in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracle import alibi, band, close, gradients, standard
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import flashtile
from flashtile import execution
from flashtile.integrations.flash_attn import functions, interface
from flashtile.problem import Call

NO_DEFAULT = inspect.Parameter.empty
TAIL = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
STARTS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SIGNATURES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "flash_attn_func": (["q", "k", "v"], TAIL),
    "flash_attn_kvpacked_func": (["q", "kv"], TAIL),
    "flash_attn_qkvpacked_func": (["qkv"], TAIL),
    "flash_attn_varlen_func": (["q", "k", "v", *STARTS], {**TAIL, "block_table": None}),
    "flash_attn_varlen_kvpacked_func": (["q", "kv", *STARTS], TAIL),
    "flash_attn_varlen_qkvpacked_func": (["qkv", "cu_seqlens", "max_seqlen"], TAIL),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_exactly_the_original(name: str) -> None:
    required, optional = SIGNATURES[name]
    parameters = inspect.signature(getattr(flashtile, name)).parameters.values()
    assert [(p.name, p.default) for p in parameters] == [*((n, NO_DEFAULT) for n in required), *optional.items()]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def randn(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


FEATURES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # id: (arguments of flash_attn_func, the same for `standard`) with q_len 5, k_len 7, 4 heads
    "plain": ({}, {}),
    "scale": ({"softmax_scale": 0.3}, {"scale": 0.3}),
    "causal": ({"causal": True}, {"seen": band(5, 7, None, 0)}),
    "window": ({"window_size": (2, 1)}, {"seen": band(5, 7, 2, 1)}),
    "window-left": ({"window_size": [2, -1]}, {"seen": band(5, 7, 2, None)}),
    "window-right-0": ({"window_size": (-1, 0)}, {"seen": band(5, 7, None, 0)}),
    "window-tensor": ({"window_size": torch.tensor([1, 2])}, {"seen": band(5, 7, 1, 2)}),
    "causal-window": ({"causal": True, "window_size": (2, 2)}, {"seen": band(5, 7, 2, 0)}),
    "softcap": ({"softcap": 0.7}, {"softcap": 0.7}),
    "alibi": ({"alibi_slopes": torch.tensor([0.1, 0.2, 0.4, 0.8])}, {"slopes": torch.tensor([[0.1, 0.2, 0.4, 0.8]])}),
    "alibi-batch": (
        {"alibi_slopes": torch.arange(8.0).view(2, 4) / 8, "causal": True},
        {"slopes": torch.arange(8.0).view(2, 4) / 8, "seen": band(5, 7, None, 0)},
    ),
}


def expected_of(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    options = dict(options)
    slopes = options.pop("slopes", None)
    added = None if slopes is None else alibi(slopes.double(), q.shape[1], k.shape[1])
    return standard(q, k, v, added=added, **options)


@pytest.mark.parametrize("feature", FEATURES)
def test_dense_against_the_definition(feature: str) -> None:
    ours, theirs = FEATURES[feature]
    q, k, v = randn(2, 5, 4, 8), randn(2, 7, 2, 8), randn(2, 7, 2, 8)
    out, lse, probs = flashtile.flash_attn_func(q, k, v, **ours, return_attn_probs=True)
    expected, expected_lse = expected_of(q, k, v, theirs)
    close((out, lse), (expected, expected_lse))
    assert probs.numel() == 0
    assert torch.equal(flashtile.flash_attn_func(q, k, v, **ours), out)
    # A gradient that is not contiguous, as the original takes it.
    dout = randn(2, 8, 5, 4, grad=False).permute(0, 2, 3, 1)
    close(gradients((out,), [q, k, v], [dout]), gradients((expected,), [q, k, v], [dout]))


@pytest.mark.parametrize("feature", FEATURES)
def test_packed_is_bitwise_the_same(feature: str) -> None:
    options, _ = FEATURES[feature]
    qkv = randn(2, 5, 3, 4, 8)
    q, k, v = (t.detach().requires_grad_() for t in qkv.unbind(2))
    out, dout = flashtile.flash_attn_qkvpacked_func(qkv, **options), randn(2, 5, 4, 8, grad=False)
    expected = flashtile.flash_attn_func(q, k, v, **options)
    assert torch.equal(out, expected)
    (dqkv,) = gradients((out,), [qkv], [dout])
    assert torch.equal(dqkv, torch.stack(gradients((expected,), [q, k, v], [dout]), 2))

    q, kv = randn(2, 5, 4, 8), randn(2, 7, 2, 2, 8)
    k, v = (t.detach().requires_grad_() for t in kv.unbind(2))
    out, expected = flashtile.flash_attn_kvpacked_func(q, kv, **options), flashtile.flash_attn_func(q, k, v, **options)
    assert torch.equal(out, expected)
    (dq, dkv), (eq, ek, ev) = gradients((out,), [q, kv], [dout]), gradients((expected,), [q, k, v], [dout])
    assert torch.equal(dq, eq)
    assert torch.equal(dkv, torch.stack([ek, ev], 2))


Q_STARTS, K_STARTS = torch.tensor([0, 3, 3, 8], dtype=torch.int32), torch.tensor([0, 4, 6, 6], dtype=torch.int32)


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "alibi-batch"])
def test_varlen_is_each_sequence_alone(feature: str) -> None:
    options, _ = FEATURES[feature]
    q, k, v = randn(9, 4, 8), randn(7, 2, 8), randn(7, 2, 8)  # one row behind the last sequence
    arguments = (q, k, v, Q_STARTS, K_STARTS, 5, 4)
    out, lse, _ = flashtile.flash_attn_varlen_func(*arguments, **options, return_attn_probs=True)
    assert lse.shape == (4, 9)
    q_ends, k_ends = Q_STARTS.tolist(), K_STARTS.tolist()
    outs, lses = [], []
    for rows, keys in zip(map(slice, q_ends, q_ends[1:]), map(slice, k_ends, k_ends[1:]), strict=True):
        alone = flashtile.flash_attn_func(
            q[None, rows], k[None, keys], v[None, keys], **options, return_attn_probs=True
        )
        outs.append(alone[0][0])
        lses.append(alone[1][0])
    expected = torch.cat([*outs, q.new_zeros(1, 4, 8)])
    close(out, expected)
    close(lse, torch.cat([*lses, lse.new_full((4, 1), torch.inf)], 1))
    assert bool((lse[:, 3:8] == torch.inf).all()), "the last sequence has queries and no keys"
    dout = randn(9, 4, 8, grad=False)
    close(gradients((out,), [q, k, v], [dout]), gradients((expected,), [q, k, v], [dout]))


def test_varlen_packed_is_bitwise_the_same() -> None:
    qkv, dout = randn(9, 3, 4, 8), randn(9, 4, 8, grad=False)
    q, k, v = (t.detach().requires_grad_() for t in qkv.unbind(1))
    expected = flashtile.flash_attn_varlen_func(q, k, v, Q_STARTS, Q_STARTS, 5, 5, causal=True)
    out = flashtile.flash_attn_varlen_qkvpacked_func(qkv, Q_STARTS, 5, causal=True)
    assert torch.equal(out, expected)
    grads = gradients((expected,), [q, k, v], [dout])
    assert torch.equal(gradients((out,), [qkv], [dout])[0], torch.stack(grads, 1))
    kv = torch.stack([k, v], 1).detach().requires_grad_()
    out = flashtile.flash_attn_varlen_kvpacked_func(q, kv, Q_STARTS, Q_STARTS, 5, 5, causal=True)
    assert torch.equal(out, expected)
    assert torch.equal(gradients((out,), [kv], [dout])[0], torch.stack(grads[1:], 1))


def big_copies(work: Callable[[], object], size: int) -> list[str]:
    """The operations inside `work` that move a tensor of at least `size` elements to another place."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        work()
    movers = {"aten::cat", "aten::stack", "aten::copy_", "aten::clone", "aten::_to_copy", "aten::contiguous"}
    found = []
    for event in recorded.events():
        sizes = [
            torch.Size(shape).numel()
            for shape in event.input_shapes
            if shape and all(isinstance(n, int) for n in shape)
        ]
        joined = event.name in (
            "aten::cat",
            "aten::stack",
        )  # their tensors come in a list, whose shapes are not recorded
        if event.name in movers and (joined or max(sizes, default=0) >= size):
            found.append(event.name)
    return found


def test_packed_gradient_is_one_tensor_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    allocate = execution.empty_gradients

    def remember(call: Call) -> tuple[Tensor, Tensor | None, Tensor | None]:
        grads = allocate(call)
        made.extend(t.data_ptr() for t in grads if t is not None)
        return grads

    monkeypatch.setattr(execution, "empty_gradients", remember)
    qkv, kv, q = (torch.randn(2, 64, *n, 4, 32, requires_grad=True) for n in ((3,), (2,), ()))
    dout = torch.randn(2, 64, 4, 32)
    for leaves, out in (
        ([qkv], flashtile.flash_attn_qkvpacked_func(qkv)),
        ([q, kv], flashtile.flash_attn_kvpacked_func(q, kv)),
    ):
        made.clear()
        grads: list[Tensor] = []
        assert not big_copies(
            lambda out=out, to=leaves, got=grads: got.extend(gradients((out,), to, [dout])), kv.numel()
        )
        assert [grad.data_ptr() for grad in grads] == made
        assert all(grad.is_contiguous() and grad.shape == leaf.shape for grad, leaf in zip(grads, leaves, strict=True))


def test_a_concatenated_gradient_is_found() -> None:
    qkv, dout = torch.randn(2, 64, 3, 4, 32, requires_grad=True), torch.randn(2, 64, 4, 32)
    out = flashtile.flash_attn_func(*qkv.unbind(2))  # autograd stacks what it unbound
    assert big_copies(lambda: gradients((out,), [qkv], [dout]), qkv.numel())
    assert big_copies(lambda: torch.empty_like(qkv).copy_(qkv), qkv.numel())


def test_lse_of_a_row_that_sees_nothing_is_inf_as_in_the_original() -> None:
    q, k = randn(1, 5, 2, 8), randn(1, 3, 2, 8)
    out, lse, _ = flashtile.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert bool((lse[..., :2] == torch.inf).all())
    assert bool(torch.isfinite(lse[..., 2:]).all())
    assert not bool(out[:, :2].any())
    _, native = flashtile.attention(q, k, k, causal=True, return_lse=True)
    assert bool((native[..., :2] == -torch.inf).all())
    close(gradients((lse[..., 2:],), [q, k], [torch.ones_like(lse[..., 2:])]),
          gradients((native[..., 2:],), [q, k], [torch.ones_like(lse[..., 2:])]))  # fmt: skip


def from_pattern(pattern: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """out (batch, q_len, heads, dim) as the third result says: weights from magnitudes, dropout from signs."""
    pattern = pattern[..., : v.shape[1]].double()
    weights = pattern.abs() / pattern.abs().sum(-1, keepdim=True).clamp_min(1e-300)
    kept = torch.where(torch.signbit(pattern), 0.0, weights) / (1 - dropout_p)
    return (kept @ v.repeat_interleave(pattern.shape[1] // v.shape[2], 2).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("feature", FEATURES)
def test_dropout_pattern_explains_the_result(feature: str) -> None:
    options, _ = FEATURES[feature]
    q, k, v = randn(2, 5, 4, 8), randn(2, 7, 2, 8), randn(2, 7, 2, 8)
    out, _, pattern = flashtile.flash_attn_func(q, k, v, 0.4, **options, return_attn_probs=True)
    assert pattern.shape == (2, 4, 128, 128)
    assert pattern.dtype == q.dtype
    assert not bool(pattern[:, :, 5:].any())
    assert not bool(pattern[..., 7:].any())
    assert bool(torch.signbit(pattern[:, :, :5, :7]).any())
    close(from_pattern(pattern[:, :, :5], v, 0.4), out)
    dout = randn(2, 5, 4, 8, grad=False)
    close(gradients((from_pattern(pattern[:, :, :5], v, 0.4),), [v], [dout]), gradients((out,), [v], [dout]))


def test_dropout_pattern_of_packed_sequences() -> None:
    q, kv = randn(9, 4, 8), randn(7, 2, 2, 8)
    starts = (Q_STARTS, K_STARTS, 5, 4)
    out, _, pattern = flashtile.flash_attn_varlen_kvpacked_func(
        q, kv, *starts, 0.4, causal=True, return_attn_probs=True
    )
    assert pattern.shape == (3, 4, 128, 128)
    for b, rows, keys in ((0, slice(0, 3), slice(0, 4)), (2, slice(3, 8), slice(6, 6))):
        length = rows.stop - rows.start
        close(from_pattern(pattern[b : b + 1, :, :length], kv[None, keys, 1], 0.4)[0], out[rows])


def test_dropout_follows_the_generator() -> None:
    qkv = torch.randn(2, 33, 3, 4, 16)

    def run(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        return flashtile.flash_attn_qkvpacked_func(qkv, 0.2, return_attn_probs=True)

    for again, first in zip(run(7), run(7), strict=True):
        assert torch.equal(again, first)
    assert not torch.equal(run(7)[0], run(8)[0])
    dropped = torch.signbit(run(7)[2][:, :, :33, :33]).double().mean().item()
    assert abs(dropped - 0.2) < 5 * (0.2 * 0.8 / (2 * 4 * 33 * 33)) ** 0.5


def test_deterministic_reaches_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = []
    attend = functions.attend

    def remember(call: Call) -> tuple[Tensor, Tensor]:
        calls.append(call)
        return attend(call)

    monkeypatch.setattr(functions, "attend", remember)
    q = randn(1, 5, 2, 8)
    flashtile.flash_attn_func(q, q, q)
    flashtile.flash_attn_func(q, q, q, deterministic=True)
    torch.use_deterministic_algorithms(True)
    flashtile.flash_attn_func(q, q, q)
    assert [call.deterministic for call in calls] == [False, True, True]


def test_half_precision_autocast_and_no_elements() -> None:
    q = torch.randn(2, 5, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse, _ = flashtile.flash_attn_func(q, q, q, return_attn_probs=True)
        packed = flashtile.flash_attn_qkvpacked_func(torch.stack([q, q, q], 2))
    assert (out.dtype, lse.dtype, packed.dtype) == (torch.bfloat16, torch.float32, torch.bfloat16)
    half = q.bfloat16()
    assert torch.equal(out, flashtile.flash_attn_func(half, half, half))
    assert torch.equal(out, packed)
    assert flashtile.flash_attn_qkvpacked_func(q.new_empty(0, 5, 3, 4, 8)).shape == (0, 5, 4, 8)
    nothing = torch.zeros(1, dtype=torch.int32)
    out, lse, pattern = flashtile.flash_attn_varlen_qkvpacked_func(
        q.new_empty(0, 3, 4, 8), nothing, 0, 0.5, return_attn_probs=True
    )
    assert (out.shape, lse.shape, pattern.numel()) == ((0, 4, 8), (4, 0), 0)


@pytest.mark.parametrize("kind", [torch.tensor, np.int64, lambda n: torch.tensor([n], dtype=torch.int32)])
def test_the_longest_sequence_may_come_as_one_integer_of_another_kind(kind: Callable[[int], Any]) -> None:
    q, k = randn(9, 4, 8, grad=False), randn(7, 2, 8, grad=False)
    expected = flashtile.flash_attn_varlen_func(q, k, k, Q_STARTS, K_STARTS, 5, 4)
    assert torch.equal(flashtile.flash_attn_varlen_func(q, k, k, Q_STARTS, K_STARTS, kind(5), kind(4)), expected)
    numbers = (0.0, 8**-0.5, False)
    step = interface._flash_attn_varlen_forward(q, k, k, Q_STARTS, K_STARTS, kind(5), kind(4), *numbers)
    assert torch.equal(step[0], expected)
    with pytest.raises(TypeError, match="max_seqlen_q: got Tensor, expected an int"):
        flashtile.flash_attn_varlen_func(q, k, k, Q_STARTS, K_STARTS, torch.tensor(5.0), 4)
