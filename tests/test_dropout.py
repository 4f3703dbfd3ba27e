"""Dropout's random mask: its generator, its rate and independence, and that every backend drops the same elements."""

from __future__ import annotations

import math

import pytest
import torch
from places import every_place
from torch import Tensor

import flashtile
from flashtile.dropout import _philox, draw, keep_mask, threshold

HEADS, ROWS, COLUMNS = 4, 256, 256


def mask(dropout_p: float, seed: int = 1, offset: int = 2) -> Tensor:
    """Kept elements, [HEADS, ROWS, COLUMNS]."""
    head, row, column = (torch.arange(n) for n in (HEADS, ROWS, COLUMNS))
    return keep_mask(torch.tensor([seed, offset]), dropout_p, head[:, None, None], row[:, None], column)


def chi_square_exceeds(statistic: float, freedom: int) -> bool:
    """Whether chance gives so large a statistic less than once in 10000, by Wilson and Hilferty's cube root."""
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return normal > 3.72


def test_the_generator_is_philox_with_seven_rounds() -> None:
    """The known answers that the authors publish with their library, Random123, for philox4x32 with 7 rounds."""
    pi = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
    ones = ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)
    answers = {
        ((0,) * 4, (0,) * 2): (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
        ones: (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
        pi: (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
    }
    for (counter, key), answer in answers.items():
        words = _philox(*(torch.tensor(word) for word in (*counter, *key)))
        assert tuple(int(word) for word in words) == answer


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_the_rate(dropout_p: float) -> None:
    kept = mask(dropout_p)
    wanted = 1 - threshold(dropout_p) / 65536
    deviation = math.sqrt(wanted * (1 - wanted) / kept.numel())
    assert abs(float(kept.double().mean()) - wanted) < 4 * deviation
    assert abs(wanted - (1 - dropout_p)) <= 2**-17


def test_the_ends() -> None:
    assert mask(0.0).all()
    assert not mask(1.0).any()


def test_more_is_dropped_at_a_higher_rate() -> None:
    """The same bits are compared with a higher threshold: what 0.3 drops, 0.6 drops too."""
    assert (mask(0.3) | ~mask(0.6)).all()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_slice_has_the_rate(axis: int) -> None:
    """No head, row or column is dropped more than others: chi-square over the slices' counts."""
    kept = mask(0.2).double().movedim(axis, 0).flatten(1)
    wanted, size = 1 - threshold(0.2) / 65536, kept.shape[1]
    statistic = float(((kept.sum(1) - size * wanted) ** 2 / (size * wanted * (1 - wanted))).sum())
    assert not chi_square_exceeds(statistic, kept.shape[0])
    assert not chi_square_exceeds(2 * kept.shape[0] - statistic, kept.shape[0])  # nor suspiciously even


SHIFTS = (
    (0, 0, 1),
    (0, 0, 2),
    (0, 0, 8),
    (0, 0, 9),
    (0, 1, 0),
    (0, 8, 0),
    (0, 8, 8),
    (0, 1, 1),
    (0, 1, 255),
    (1, 0, 0),
)


def dependence(a: Tensor, b: Tensor) -> float:
    """Chi-square, one degree of freedom, of the two by two table of two boolean fields."""
    n = a.numel()
    both, only_a, only_b = (float(t.sum()) for t in (a & b, a, b))
    expected = only_a * only_b / n
    return (both - expected) ** 2 * n**3 / (only_a * only_b * (n - only_a) * (n - only_b))


@pytest.mark.parametrize("shift", SHIFTS, ids=str)
def test_neighbours_are_independent(shift: tuple[int, int, int]) -> None:
    """Next columns, rows and heads; 8 and 9 apart lie in one call of the generator."""
    kept = mask(0.4)
    assert not chi_square_exceeds(dependence(kept, kept.roll(shift, (0, 1, 2))), 1)


@pytest.mark.parametrize(("seed", "offset"), [(2, 2), (1, 3), (2, 1), (1 + 2**32, 2), (1 + 2**62, 2), (1, 2 + 2**31)])
def test_other_states_are_independent(seed: int, offset: int) -> None:
    assert not chi_square_exceeds(dependence(mask(0.4), mask(0.4, seed, offset)), 1)


def test_the_tests_of_independence_reject_dependence() -> None:
    kept = mask(0.4)
    assert chi_square_exceeds(dependence(kept, kept), 1)
    assert chi_square_exceeds(dependence(kept, kept & mask(0.05, 7)), 1)
    # Two elements of a hundred copied: an effect as small as that is found.
    alike = torch.where(mask(0.02, 8), mask(0.4, 9), kept)
    assert chi_square_exceeds(dependence(kept, alike), 1)


def dropped_by(backend: str, device: str, dropout_p: float, grad: bool) -> tuple[Tensor, Tensor]:
    """The weights that a backend keeps of equal weights, [2, 3, 70, 90] boolean, and the same by keep_mask.

    With v (or in the backward dout) the identity, out (or dv) is the matrix of weights itself.
    """
    batch, heads, rows, columns = 2, 3, 70, 90
    q, k = torch.zeros(batch, rows, heads, 8, device=device), torch.zeros(batch, columns, heads, 8, device=device)
    v = torch.eye(columns, device=device)[None, :, None].repeat(batch, 1, heads, 1)
    dout = torch.eye(rows, device=device)[None, :, None].repeat(batch, 1, heads, 1)
    torch.manual_seed(11)
    if grad:
        v = torch.zeros(batch, columns, heads, rows, device=device, requires_grad=True)
        out = flashtile.attention(q, k, v, dropout_p=dropout_p, backend=backend)
        torch.manual_seed(12)  # the backward must not draw again
        assert isinstance(out, Tensor)
        weights = torch.autograd.grad(out, v, dout)[0].permute(0, 2, 3, 1)
    else:
        out = flashtile.attention(q, k, v, dropout_p=dropout_p, backend=backend)
        assert isinstance(out, Tensor)
        weights = out.transpose(1, 2)
    torch.manual_seed(11)
    rng = draw(torch.device(device))
    batch_head = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    row, column = torch.arange(rows, device=device)[:, None], torch.arange(columns, device=device)
    kept = weights > 0.5 / columns
    torch.testing.assert_close(weights, kept / columns / (1 - dropout_p))
    return kept, keep_mask(rng, dropout_p, batch_head, row, column)


@every_place
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_every_backend_drops_the_same_elements(backend: str, device: str, grad: bool) -> None:
    kept, wanted = dropped_by(backend, device, 0.3, grad)
    assert torch.equal(kept, wanted)


@every_place
def test_pytorch_seeds_it(backend: str, device: str) -> None:
    q = torch.randn(1, 40, 2, 8, device=device)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return tuple(flashtile.attention(q, q, q, dropout_p=0.5, backend=backend) for _ in range(2))

    first, second = run(1)
    assert not torch.equal(first, second)
    assert torch.equal(run(1)[0], first)
    assert torch.equal(run(1)[1], second)
    assert not torch.equal(run(2)[0], first)


@every_place
def test_no_random_number_is_drawn_without_dropout(backend: str, device: str) -> None:
    q = torch.randn(1, 5, 1, 8, device=device)
    before = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    flashtile.attention(q, q, q, dropout_p=0.0, backend=backend)
    assert torch.equal(before, torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state())


def test_the_mean_over_many_masks_is_attention() -> None:
    q, k, v = (torch.randn(1, 6, 1, 4, dtype=torch.float64) for _ in range(3))
    wanted = flashtile.attention(q, k, v)
    runs = torch.stack([flashtile.attention(q, k, v, dropout_p=0.3, backend="reference") for _ in range(800)])
    assert isinstance(wanted, Tensor)
    deviation = runs.std(0) / math.sqrt(len(runs))
    assert ((runs.mean(0) - wanted).abs() < 4.5 * deviation).all()


def test_lse_knows_nothing_of_dropout() -> None:
    q, k, v = (torch.randn(1, 6, 1, 4) for _ in range(3))
    _, lse = flashtile.attention(q, k, v, return_lse=True, backend="reference")
    _, with_dropout = flashtile.attention(q, k, v, dropout_p=0.5, return_lse=True, backend="reference")
    assert torch.equal(lse, with_dropout)
