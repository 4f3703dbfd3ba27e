"""flash_attn.bert_padding: which tokens go where, by lists, and their gradients by finite differences."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile.integrations.flash_attn import bert_padding
from flashtile.integrations.flash_attn.bert_padding import (
    IndexFirstAxis,
    IndexFirstAxisResidual,
    IndexPutFirstAxis,
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]])
SHOWN = [(0, 0), (0, 1), (1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_unpad_and_pad_again(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    hidden = torch.randn(3, 4, *shape)
    tokens, indices, cu_seqlens, longest, used = unpad_input(hidden, MASK.to(dtype))
    assert torch.equal(tokens, torch.stack([hidden[place] for place in SHOWN]))
    assert indices.tolist() == [4 * row + column for row, column in SHOWN]
    assert (cu_seqlens.tolist(), cu_seqlens.dtype) == ([0, 2, 5, 5], torch.int32)
    assert type(longest) is int
    assert longest == 3
    assert (used.tolist(), used.dtype) == ([2, 3, 0], torch.int32)
    again = pad_input(tokens, indices, 3, 4)
    for row in range(3):
        for column in range(4):
            wanted = hidden[row, column] if (row, column) in SHOWN else torch.zeros(shape)
            assert torch.equal(again[row, column], wanted)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32])
def test_unused_tokens_have_a_place_and_do_not_count(dtype: torch.dtype) -> None:
    unused = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    hidden = torch.randn(3, 4, 2)
    tokens, indices, cu_seqlens, longest, used = unpad_input(hidden, MASK.to(dtype), unused.to(dtype))
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7, 11]
    assert torch.equal(tokens, hidden.view(12, 2)[indices])
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 7, 8], 4, [2, 3, 0])


def test_concatenated_sequences() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 1, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    hidden = torch.randn(3, 6, 2)
    tokens, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(hidden, lengths)
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17]
    assert torch.equal(tokens, hidden.view(18, 2)[indices])
    assert (cu_seqlens.tolist(), cu_seqlens.dtype, longest) == ([0, 2, 5, 8, 9, 15], torch.int32, 6)
    assert type(longest) is int


def test_gradients() -> None:
    values = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 5])
    assert torch.autograd.gradcheck(index_first_axis, (values, indices))
    assert torch.autograd.gradcheck(index_put_first_axis, (values[:3].detach().requires_grad_(), indices, 7))
    assert torch.autograd.gradcheck(
        lambda x: torch.cat([part.flatten() for part in index_first_axis_residual(x, indices)]), (values,)
    )
    rows, residual = index_first_axis_residual(values, indices)
    assert torch.equal(rows, values[indices])
    assert torch.equal(residual, values)


def test_a_batch_through_attention() -> None:
    """Padded in, padded out: what a padded batch's real tokens get is what each sequence gets alone."""
    hidden = torch.randn(3, 4, 2, 8, dtype=torch.float64, requires_grad=True)
    tokens, indices, starts, longest, _ = unpad_input(hidden, MASK)
    out = flashtile.flash_attn_varlen_func(tokens, tokens, tokens, starts, starts, longest, longest)
    padded = pad_input(out, indices, 3, 4)
    alone = [flashtile.flash_attn_func(part, part, part) for part in (hidden[:1, :2], hidden[1:2, 1:])]
    torch.testing.assert_close(padded[0, :2], alone[0][0])
    torch.testing.assert_close(padded[1, 1:], alone[1][0])
    assert not bool(padded[2].any())
    (got,) = torch.autograd.grad(padded.square().sum(), hidden, retain_graph=True)
    (wanted,) = torch.autograd.grad(sum(part.square().sum() for part in alone), hidden)
    torch.testing.assert_close(got, wanted)


def test_classes_are_the_functions() -> None:
    x, indices = torch.randn(4, 2), torch.tensor([2, 1])
    assert torch.equal(IndexFirstAxis.apply(x, indices), x[indices])
    assert torch.equal(IndexPutFirstAxis.apply(x[:2], indices, 3)[1:], x[[1, 0]])
    assert torch.equal(IndexFirstAxisResidual.apply(x, indices)[0], x[indices])


@pytest.mark.parametrize("call", [lambda x, i: index_first_axis(x, i), lambda x, i: index_put_first_axis(x, i, 5)])
def test_a_vector_is_refused(call: object) -> None:
    with pytest.raises(ValueError, match="got shape"):
        call(torch.randn(4), torch.tensor([1]))
    with pytest.raises(ValueError, match="indices: got shape"):
        index_put_first_axis(torch.randn(4, 2), torch.tensor([[1]]), 5)


def test_einops_functions_are_found_where_software_looks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def rearrange(x: Tensor) -> Tensor:
        return x

    monkeypatch.setitem(sys.modules, "einops", SimpleNamespace(rearrange=rearrange))
    assert bert_padding.rearrange is rearrange
    with pytest.raises(AttributeError, match="no attribute 'reduce'"):
        _ = bert_padding.reduce
