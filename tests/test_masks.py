"""Masks against a predicate over single pairs: bounds, tables, intersections, alignment, the transposed bounds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashtile import masks
from flashtile.masks import Causal, Chunked, Documents, Full, Intervals, Mask, Prefix, Window

Sees = Callable[[int, int, int], bool]  # (position of the row, key, k_len)


def same_document(lengths: tuple[int, ...], position: int, key: int) -> bool:
    labels = [label for label, length in enumerate(lengths) for _ in range(length)]
    return 0 <= position < len(labels) and key < len(labels) and labels[position] == labels[key]


PREDICATES: dict[Mask, Sees] = {
    Full(): lambda p, j, n: True,
    Causal(): lambda p, j, n: j <= p,
    Window(3, 0): lambda p, j, n: p - 3 <= j <= p,
    Window(2, 5): lambda p, j, n: p - 2 <= j <= p + 5,
    Window(None, -2): lambda p, j, n: j <= p - 2,
    Window(-1, None): lambda p, j, n: j >= p + 1,
    Window(-4, 2): lambda p, j, n: False,
    Prefix(4): lambda p, j, n: j < 4 or j <= p,
    Prefix(0): lambda p, j, n: j <= p,
    Prefix(99): lambda p, j, n: True,
    Chunked(5): lambda p, j, n: j // 5 == p // 5,
    Chunked(4, 2): lambda p, j, n: p // 4 * 4 - 2 <= j < p // 4 * 4 + 6,
    Documents((3, 0, 5, 1)): lambda p, j, n: same_document((3, 0, 5, 1), p, j),
    Documents(()): lambda p, j, n: False,
}
SHAPES = ((11, 11), (5, 11), (11, 5), (1, 9), (9, 1), (0, 4), (4, 0))

every_mask = pytest.mark.parametrize("mask", PREDICATES, ids=str)
every_shape = pytest.mark.parametrize(("q_len", "k_len"), SHAPES)


def visible(lo: Tensor, hi: Tensor, k_len: int) -> Tensor:
    column = torch.arange(k_len)
    return (column >= lo[..., None]) & (column < hi[..., None])


def by_predicate(sees: Sees, q_len: int, k_len: int) -> Tensor:
    pairs = [[sees(i + k_len - q_len, j, k_len) for j in range(k_len)] for i in range(q_len)]
    return torch.tensor(pairs, dtype=torch.bool).reshape(q_len, k_len)


@every_mask
@every_shape
def test_a_mask_is_its_predicate(mask: Mask, q_len: int, k_len: int) -> None:
    lo, hi = masks.interval_rows(masks.lower(mask, q_len, k_len), q_len, k_len)
    assert torch.equal(visible(lo, hi, k_len)[0], by_predicate(PREDICATES[mask], q_len, k_len))


@every_mask
@every_shape
def test_bounds_never_decrease(mask: Mask, q_len: int, k_len: int) -> None:
    for bound in masks.interval_rows(masks.lower(mask, q_len, k_len), q_len, k_len):
        assert (bound.diff(dim=-1) >= 0).all()
        assert ((bound >= 0) & (bound <= k_len)).all()


@pytest.mark.parametrize("first", PREDICATES, ids=str)
@pytest.mark.parametrize("second", PREDICATES, ids=str)
def test_and_is_the_intersection(first: Mask, second: Mask) -> None:
    both = first & second
    for q_len, k_len in ((11, 11), (4, 9), (9, 4)):
        lo, hi = masks.interval_rows(masks.lower(both, q_len, k_len), q_len, k_len)
        wanted = by_predicate(PREDICATES[first], q_len, k_len) & by_predicate(PREDICATES[second], q_len, k_len)
        assert torch.equal(visible(lo, hi, k_len)[0], wanted)


def test_only_bands_lower_to_distances() -> None:
    """A band costs the kernels two comparisons; a table is read from memory."""
    assert masks.lower(Causal() & Window(4, 9), 8, 8) == masks.Lowered(4, 0)
    assert masks.lower(Full(), 8, 8) == masks.Lowered()
    lowered = masks.lower(Prefix(3), 8, 8)
    assert lowered.lo is not None
    assert lowered.lo.dtype == torch.int32
    assert lowered.lo.is_contiguous()
    assert (lowered.left, lowered.right) == (None, None)


@every_mask
def test_packed_sequences_have_the_masks_of_single_ones(mask: Mask) -> None:
    q_lens, k_lens = (7, 0, 3, 5), (4, 6, 0, 9)
    starts_q, starts_k = (torch.tensor([0, *lens]).cumsum(0).int() for lens in (q_lens, k_lens))
    lowered = masks.lower_varlen(mask, starts_q, starts_k, max_seqlen_q=8)
    for b, (q_len, k_len) in enumerate(zip(q_lens, k_lens, strict=True)):
        one = lowered
        if lowered.lo is not None and lowered.hi is not None:
            assert lowered.lo.shape == (4, 8)
            assert (lowered.lo.diff(dim=-1) >= 0).all()
            assert (lowered.hi.diff(dim=-1) >= 0).all()
            one = masks.Lowered(None, None, lowered.lo[b : b + 1], lowered.hi[b : b + 1])
        lo, hi = masks.interval_rows(one, q_len, k_len)
        assert torch.equal(visible(lo, hi, k_len)[0], by_predicate(PREDICATES[mask], q_len, k_len))


bounds = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=9)


@given(bounds, st.integers(1, 12))
def test_the_transposed_bounds(pairs: list[tuple[int, int]], k_len: int) -> None:
    """Key j is seen by the rows [first(j), end(j)): for any two non-decreasing bounds, crossing ones too."""
    lo, hi = (torch.tensor([sorted(side)]).clamp(max=k_len) for side in zip(*pairs, strict=True))
    first, end = masks.rows_seeing(lo, hi, k_len)
    assert first.dtype == end.dtype == torch.int32
    row = torch.arange(len(pairs))[:, None]
    transposed = (row >= first[0]) & (row < end[0])
    assert torch.equal(transposed, visible(lo, hi, k_len)[0])


def test_intervals_per_batch_entry() -> None:
    lo, hi = torch.tensor([[0, 1, 1], [2, 2, 3]]), torch.tensor([[2, 2, 4], [2, 5, 9]])
    rows = masks.interval_rows(masks.lower(Intervals(lo, hi) & Window(None, 1), 3, 4), 3, 4)
    band = by_predicate(lambda p, j, n: j <= p + 1, 3, 4)
    assert torch.equal(visible(*rows, 4), visible(lo, hi, 4) & band)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Intervals(torch.tensor([1, 0]), torch.tensor([2, 2])), ValueError, "lo: got a bound that decreases"),
        (lambda: Intervals(torch.tensor([0, 0]), torch.tensor([2, 1])), ValueError, "hi: got a bound that decreases"),
        (lambda: Intervals(torch.tensor([0.0]), torch.tensor([2])), TypeError, "lo: got torch.float32"),
        (lambda: Intervals(torch.tensor([0]), torch.tensor([2, 2])), ValueError, "hi: got shape (2,), expected (1,)"),
        (lambda: Intervals(torch.tensor(0), torch.tensor(2)), ValueError, "lo: got 0 dimensions"),
        (lambda: masks.lower(Intervals(torch.tensor([0]), torch.tensor([2])), 3, 4), ValueError, "1 rows, expected 3"),
        (lambda: Causal() & "window", TypeError, "unsupported operand"),
    ],
)
def test_bad_masks_are_refused(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert words in str(caught.value)
