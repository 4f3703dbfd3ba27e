"""merge_states: attention over parts of the keys, merged, is attention over all of them; gradients too."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile.masks import Intervals, Window

State = tuple[Tensor, Tensor]


def qkv(batch: int = 2, q_len: int = 7, k_len: int = 12, heads: int = 4, kv_heads: int = 2) -> list[Tensor]:
    sizes = ((q_len, heads), (k_len, kv_heads), (k_len, kv_heads))
    return [torch.randn(batch, n, h, 8, dtype=torch.float64, requires_grad=True) for n, h in sizes]


def attend(q: Tensor, k: Tensor, v: Tensor, **features: object) -> State:
    return flashtile.attention(q, k, v, return_lse=True, backend="reference", **features)


def merged(states: list[State]) -> State:
    return flashtile.merge_states([out for out, _ in states], [lse for _, lse in states])


@pytest.mark.parametrize("cuts", [(0, 12), (0, 5, 12), (0, 1, 6, 6, 12)], ids=str)
def test_parts_of_the_keys_merge_to_the_whole(cuts: tuple[int, ...]) -> None:
    """Also in another order, and with a part that has no keys."""
    q, k, v = inputs = qkv()
    whole = attend(q, k, v)
    states = [attend(q, k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(cuts)]
    upstream = [torch.randn_like(t) for t in whole]
    wanted = torch.autograd.grad(whole, inputs, upstream, retain_graph=True)
    for order in (states, states[::-1]):
        out, lse = merged(order)
        torch.testing.assert_close((out, lse), whole)
        grads = torch.autograd.grad((out, lse), inputs, upstream, retain_graph=True)
        torch.testing.assert_close(grads, wanted)


def test_rows_that_a_part_does_not_see() -> None:
    """A part may see nothing of a row, and all parts may: 0 and -inf, and no NaN in any gradient."""
    q, k, v = inputs = qkv()
    near, far = Window(2, -3), Window(None, -6)
    lo, hi = torch.tensor([0] * 5 + [2, 3]), torch.tensor([0] * 5 + [3, 4])
    parts = [attend(q, k, v, mask=mask) for mask in (near & far, Intervals(lo, hi))]
    out, lse = merged(parts)
    blind = lse == -torch.inf
    assert blind.any()
    assert not blind.all()
    assert (out.transpose(1, 2)[blind] == 0).all()
    assert torch.isfinite(out).all()
    for grad in torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), torch.ones_like(lse))):
        assert torch.isfinite(grad).all()


def test_packed_sequences() -> None:
    q, k, v = (t.detach().flatten(0, 1) for t in qkv())
    starts_q, starts_k = torch.tensor([0, 7, 14]).int(), torch.tensor([0, 12, 24]).int()
    features = {"return_lse": True, "backend": "reference"}
    whole = flashtile.attention_varlen(q, k, v, starts_q, starts_k, **features)
    windows = (Window(3, None), Window(None, -4))
    states = [flashtile.attention_varlen(q, k, v, starts_q, starts_k, mask=window, **features) for window in windows]
    torch.testing.assert_close(merged(states), whole)


def test_a_sink_is_a_state_without_a_value() -> None:
    q, k, v = (t.detach() for t in qkv())
    sinks = torch.randn(4, dtype=torch.float64)
    plain = attend(q, k, v)
    sink = torch.zeros_like(plain[0]), sinks[None, :, None].expand_as(plain[1])
    torch.testing.assert_close(merged([plain, sink]), attend(q, k, v, sinks=sinks))


def test_half_precision_is_merged_in_float32() -> None:
    outs = [torch.randn(1, 3, 2, 4).half() for _ in range(3)]
    lses = [torch.randn(1, 2, 3) for _ in range(3)]
    out, lse = flashtile.merge_states(outs, lses)
    exact, exact_lse = flashtile.merge_states([t.double() for t in outs], [t.double() for t in lses])
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(out.double(), exact, rtol=2**-11 * 1.01, atol=1e-6)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


def test_large_states_neither_overflow_nor_lose_weight() -> None:
    """At 1e4 a float32 lse is a multiple of 0.001; weights taken from it would add up to 0.9998."""
    out, lse = flashtile.merge_states(
        [torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)],
        [torch.full((1, 1, 1), 1e4), torch.full((1, 1, 1), 1e4)],
    )
    assert float(out) == pytest.approx(2.0)
    assert float(lse) == pytest.approx(1e4 + 0.6931, abs=1e-3)


@pytest.mark.parametrize(
    ("outs", "lses", "error"),
    [
        ([], [], ValueError),
        ([torch.zeros(1, 2, 3, 4)], [], ValueError),
        ([torch.zeros(1, 2, 3, 4)], [torch.zeros(1, 2, 3)], ValueError),
        ([torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 5)], [torch.zeros(1, 3, 2)] * 2, ValueError),
        (torch.zeros(1, 2, 3, 4), [torch.zeros(1, 3, 2)], TypeError),
        ([1.0], [torch.zeros(1, 3, 2)], TypeError),
    ],
)
def test_states_that_do_not_fit_are_refused(outs: object, lses: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="got"):
        flashtile.merge_states(outs, lses)
