"""transformers' masks as tables of intervals: element by element what its own boolean matrix says."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5")

from transformers import masking_utils as theirs

from flashtile.integrations.transformers_masks import attention_mask_for, from_table, is_table

BATCH = 3


def matrix_of(mask: Tensor | None, q_len: int, k_len: int) -> Tensor:
    """What a mask lets rows see, (batch or 1, 1, q_len, k_len); None says everything."""
    if mask is None:
        return torch.ones(1, 1, q_len, k_len, dtype=torch.bool)
    if not is_table(mask):
        assert mask.dtype == torch.bool
        return mask
    lo, hi = from_table(mask)
    assert bool((lo.diff(dim=-1) >= 0).all()) and bool((hi.diff(dim=-1) >= 0).all())
    assert int(hi.max()) <= k_len and int(lo.min()) >= 0
    column = torch.arange(k_len)
    return ((column >= lo[..., None]) & (column < hi[..., None]))[:, None]


def check(wanted: str, function: Callable[..., Any], lengths: tuple[Any, ...], **options: Any) -> None:
    """The same elements, in the wanted form: "table", "matrix" or "either"."""
    q_len, k_len, q_offset, kv_offset = lengths
    never = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    arguments = (BATCH, q_len, k_len, q_offset, kv_offset, function)
    mask = attention_mask_for(*arguments, **options)
    right = theirs.sdpa_mask(*arguments, **{**options, **never})
    assert torch.equal(matrix_of(mask, q_len, k_len).expand_as(right), right)
    assert mask is not None or wanted == "either"
    if mask is not None and wanted != "either":
        assert is_table(mask) == (wanted == "table")


def padding(k_len: int, left: bool) -> Tensor:
    seen = torch.ones(BATCH, k_len, dtype=torch.bool)
    seen[1, (slice(None, 3) if left else slice(-3, None))] = False
    seen[2] = False
    return seen


FUNCTIONS = {
    "causal": (theirs.causal_mask_function, None),
    "window": (theirs.sliding_window_causal_mask_function(4), 4),
    "two-sided": (theirs.bidirectional_mask_function, None),
    "two-sided-window": (theirs.sliding_window_bidirectional_mask_function(3), 3),
    "chunks": (theirs.chunked_causal_mask_function(4, torch.tensor([0, 3, 0])), 4),
}
# Queries and keys of a first pass, of a step with a cache, of a static cache, of a window that has moved on.
LENGTHS = [(9, 9, 0, 0), (1, 9, 8, 0), (4, 9, 5, 0), (5, 12, 0, 0), (1, 12, 6, 0), (3, 6, 10, 7), (1, 4, 20, 17)]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_tables_say_what_the_matrix_says(kind: str, lengths: tuple[int, ...]) -> None:
    function, local_size = FUNCTIONS[kind]
    causal = not kind.startswith("two")
    skips = {"allow_is_causal_skip": causal, "allow_is_bidirectional_skip": not causal, "local_size": local_size}
    for seen in (padding(lengths[1] + lengths[3], True), padding(lengths[1] + lengths[3], False)):
        check("table", function, lengths, attention_mask=seen, **skips)
    shorter = torch.ones(BATCH, lengths[0] + lengths[2], dtype=torch.bool)  # a static cache is longer than its mask
    check("either", function, lengths, attention_mask=torch.cat([~shorter[:, :1], shorter[:, 1:]], 1), **skips)
    offset = torch.tensor(lengths[2])  # a static cache keeps its offset in a tensor
    if causal:
        check("table", function, (*lengths[:2], offset, lengths[3]), **skips)


@pytest.mark.parametrize("kind", ["causal", "window", "two-sided"])
def test_a_hole_in_the_padding_is_a_matrix(kind: str) -> None:
    function, local_size = FUNCTIONS[kind]
    seen = padding(9, True)
    seen[0, 4] = False
    check("matrix", function, (9, 9, 0, 0), attention_mask=seen, local_size=local_size)


@pytest.mark.parametrize("kind", ["causal", "window", "two-sided", "chunks"])
def test_packed_sequences(kind: str) -> None:
    positions = torch.cat([torch.arange(n) for n in (4, 1, 6, 2)]).expand(BATCH, -1).clone()
    positions[1] = torch.cat([torch.arange(n) for n in (10, 3)])
    number = theirs.find_packed_sequence_indices(positions)
    function, local_size = FUNCTIONS[kind]
    packed = theirs.packed_sequence_compatibility_function(function, positions, number)
    check("table", packed, (13, 13, 0, 0), allow_is_causal_skip=False, local_size=local_size)


UNKNOWN = {
    "blocks": theirs.or_masks(
        theirs.causal_mask_function, theirs.blockwise_overlay(torch.tensor([[0, 0, 1, 1, -1]] * 3))
    ),
    "from-elsewhere": lambda b, h, q, k: (k <= q) & (k % 2 == 0),
    "elsewhere-inside": theirs.and_masks(theirs.causal_mask_function, lambda b, h, q, k: k % 3 != 0),
}


@pytest.mark.parametrize("use_vmap", [False, True])
@pytest.mark.parametrize("kind", UNKNOWN)
def test_any_other_function_is_a_matrix(kind: str, use_vmap: bool) -> None:
    seen = torch.ones(BATCH, 5, dtype=torch.bool)
    check("matrix", UNKNOWN[kind], (5, 5, 0, 0), attention_mask=seen, use_vmap=use_vmap, allow_is_causal_skip=False)


def test_a_model_that_wants_a_matrix_gets_one() -> None:
    for causal in (True, False):
        function = theirs.causal_mask_function if causal else theirs.bidirectional_mask_function
        check("matrix", function, (5, 5, 0, 0), allow_is_causal_skip=False)
        check("matrix", function, (1, 9, 4, 0), allow_is_causal_skip=False, attention_mask=padding(9, True))


def test_plain_masks_need_nothing() -> None:
    full = torch.ones(BATCH, 9, dtype=torch.bool)
    causal = {"allow_is_causal_skip": True}
    both = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    two_sided = theirs.bidirectional_mask_function
    for seen in (None, full):
        assert attention_mask_for(BATCH, 9, 9, attention_mask=seen, **causal) is None
        assert attention_mask_for(BATCH, 1, 9, 8, attention_mask=seen, **causal) is None
        assert attention_mask_for(BATCH, 7, 9, mask_function=two_sided, attention_mask=seen, **both) is None
    window = FUNCTIONS["window"][0]
    assert attention_mask_for(BATCH, 4, 4, mask_function=window, local_size=4) is None
    assert attention_mask_for(BATCH, 5, 5, mask_function=window, local_size=4) is not None
    # What the function says counts, not what the caller forgot to say.
    assert attention_mask_for(BATCH, 5, 5, mask_function=window) is not None
    assert attention_mask_for(BATCH, 5, 5, mask_function=two_sided, **both) is None
    assert attention_mask_for(BATCH, 5, 5, mask_function=FUNCTIONS["two-sided-window"][0], **both) is not None
    packed = theirs.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 1]] * BATCH))
    assert (
        attention_mask_for(BATCH, 5, 5, mask_function=theirs.and_masks(packed, theirs.causal_mask_function)) is not None
    )
    # More rows than one and fewer than keys: is_causal alone does not say where the rows stand.
    assert attention_mask_for(BATCH, 4, 9, 5) is not None
    assert attention_mask_for(BATCH, 4, 9, 0) is not None


def test_random_masks() -> None:
    torch.manual_seed(0)
    for (kind, (function, local_size)), q_len, past in itertools.product(FUNCTIONS.items(), (1, 6), (0, 5)):
        if kind == "chunks":
            continue  # its padding is part of the function
        for _ in range(5):
            seen = torch.rand(BATCH, q_len + past) > 0.3
            seen[0] = True
            check("either", function, (q_len, q_len + past, past, 0), attention_mask=seen, local_size=local_size)


def test_a_wrong_table_is_noticed() -> None:
    mask = attention_mask_for(BATCH, 9, 9, mask_function=FUNCTIONS["window"][0], local_size=4)
    assert mask is not None
    right = theirs.sdpa_mask(BATCH, 9, 9, mask_function=FUNCTIONS["window"][0], allow_is_causal_skip=False)
    mask[0, 0, 7, 0] += 1
    assert not torch.equal(matrix_of(mask, 9, 9).expand_as(right), right)
