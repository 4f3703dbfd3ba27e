"""The Hopper forward's inline PTX, run for one warp on the CPU: weights, maxima and sums of a tile's 16 rows."""

from __future__ import annotations

import numpy as np
import ptx
import pytest

pytest.importorskip("triton")

from flashtile.backends.hopper import weighing

UNIT = 0.7
COLUMNS = 64  # of a tile; a thread holds 32 scores, of columns 2 t and 2 t + 1 of each eight, in rows r and r + 8


def threads(tile: np.ndarray) -> list[np.ndarray]:
    """The registers of a warp that hold [16, columns]: element i of every lane."""
    lane = np.arange(ptx.LANES)
    found = []
    for i in range(tile.shape[1] // 2):
        column = i // 4 * 8 + lane % 4 * 2 + i % 2
        found.append(tile[lane // 4 + (i >> 1 & 1) * 8, column].astype(np.float32))
    return found


def tile_of(registers: list[np.ndarray]) -> np.ndarray:
    """The reverse of `threads`."""
    lane = np.arange(ptx.LANES)
    tile = np.empty((16, 2 * len(registers)), np.float32)
    for i, register in enumerate(registers):
        tile[lane // 4 + (i >> 1 & 1) * 8, i // 4 * 8 + lane % 4 * 2 + i % 2] = register
    return tile


def by_row(values: np.ndarray, count: int) -> list[np.ndarray]:
    """A value for each of 16 rows and four threads, as `count` registers of a warp: [16, 4] -> count x [32]."""
    lane = np.arange(ptx.LANES)
    return [values[lane // 4 + (i >> 1 & 1) * 8, lane % 4].astype(np.float32) for i in range(count)]


def weigh(code: str, s: np.ndarray, m: np.ndarray, l: np.ndarray, search: int = 0) -> tuple[np.ndarray, ...]:
    """(P, m [16], l [16, 4], the factor of earlier tiles [16]) of scores [16, COLUMNS]."""
    count = s.shape[1] // 2
    everywhere = np.full(ptx.LANES, UNIT, np.float32)
    rows = np.repeat(m[:, None], 4, 1)
    inputs = [*threads(s), *by_row(rows, count), *by_row(l, count), *[everywhere] * count]
    if code in KEEPING:
        outputs = ptx.run(code, 2 * count, inputs)
    else:
        o = np.random.default_rng(2).normal(0, 1, s.shape).astype(np.float32)
        flags = [np.full(ptx.LANES, search, np.uint32)] * count
        outputs = ptx.run(code, 3 * count, [*inputs, *threads(o), *flags])
    more = outputs[count : 2 * count]
    both = [np.concatenate([more[i].reshape(8, 4), more[i + 2].reshape(8, 4)]) for i in (0, 1, 4)]
    assert (both[0] == both[0][:, :1]).all(), "four threads agree on a row's maximum"
    if code not in KEEPING:
        np.testing.assert_array_equal(
            tile_of(outputs[2 * count :]), o * both[2][:, :1], "O is shrunk by the same factor"
        )
    return tile_of(outputs[:count]), both[0][:, 0], both[1], both[2][:, 0]


def check(
    code: str, s: np.ndarray, m: np.ndarray, l: np.ndarray | None = None, search: int = 0
) -> tuple[np.ndarray, ...]:
    """Weights, sums and factors belong to the maxima that are returned, whatever these are."""
    if l is None:
        l = np.random.default_rng(1).uniform(1, 2, (16, 4)).astype(np.float32)
    p, found, sums, shrunk = weigh(code, s, m, l, search)
    base = np.where(np.isneginf(found), 0, found).astype(np.float64)
    with np.errstate(invalid="ignore"):
        expected = np.exp2(s.astype(np.float64) * np.float32(UNIT) - base[:, None])
        factor = np.exp2(m - base)
    np.testing.assert_allclose(p, expected, rtol=2e-4, atol=1e-30)
    np.testing.assert_allclose(shrunk, factor, rtol=2e-4, atol=1e-30)
    own = expected.reshape(16, COLUMNS // 8, 4, 2).sum((1, 3))
    np.testing.assert_allclose(sums, l * factor[:, None] + own, rtol=2e-4, atol=1e-30)
    return p, found, sums, shrunk


NEVER = np.full(16, -np.inf, np.float32)
KEEPING = [weighing.keeping.fn(COLUMNS // 2, pieces) for pieces in (1, 2, 4)]
BFLOAT16, FLOAT16 = (weighing.in_place.fn(COLUMNS // 2, narrow) for narrow in (False, True))


@pytest.mark.parametrize("code", [*KEEPING, BFLOAT16, FLOAT16], ids=["1", "2", "4", "bfloat16", "float16"])
class TestWeigh:
    def test_scores_near_the_old_maximum_are_taken_against_it(self, code: str) -> None:
        s = np.random.default_rng(0).normal(0, 3, (16, COLUMNS))
        m = np.full(16, 4.0, np.float32)
        _, found, _, shrunk = check(code, s, m)
        np.testing.assert_array_equal(found, m)
        np.testing.assert_array_equal(shrunk, 1)

    def test_rows_that_have_seen_nothing_yet(self, code: str) -> None:
        s = np.random.default_rng(0).normal(0, 3, (16, COLUMNS))
        _, found, _, shrunk = check(code, s, NEVER)
        assert np.isfinite(found).all()
        np.testing.assert_array_equal(shrunk, 0)

    def test_rows_that_see_nothing_here_either(self, code: str) -> None:
        s = np.full((16, COLUMNS), -np.inf)
        s[:8] = np.random.default_rng(0).normal(0, 3, (8, COLUMNS))
        p, found, _, _ = check(code, s, NEVER)
        lowest = -np.inf if code in KEEPING else np.finfo(np.float32).min
        np.testing.assert_array_equal(found[8:], lowest)
        assert (p[8:] == 0).all()
        _, later, _, _ = check(code, np.random.default_rng(1).normal(0, 3, (16, COLUMNS)), found)
        assert (np.abs(later[8:]) < 30).all(), "a later tile finds their maxima"

    def test_a_row_that_sees_only_the_last_keys(self, code: str) -> None:
        s = np.full((16, COLUMNS), -np.inf)
        s[:, -3:] = 1
        _, found, _, _ = check(code, s, NEVER)
        np.testing.assert_allclose(found, UNIT, rtol=1e-6)

    def test_nan_stays_in_its_row(self, code: str) -> None:
        s = np.random.default_rng(0).normal(0, 3, (16, COLUMNS))
        s[3, 40] = np.nan
        p, _, sums, _ = weigh(code, s, np.zeros(16, np.float32), np.ones((16, 4), np.float32))
        assert np.isnan(sums[3]).any()
        assert np.isnan(p[3, 40])
        assert np.isfinite(np.delete(sums, 3, 0)).all()


@pytest.mark.parametrize("code", KEEPING, ids=["1", "2", "4"])
class TestKeeping:
    @pytest.mark.parametrize("column", [0, 17, 63])
    def test_one_score_far_above_moves_the_warp_to_its_maximum(self, code: str, column: int) -> None:
        s = np.random.default_rng(0).normal(0, 1, (16, COLUMNS))
        s[5, column] = 300
        p, found, _, shrunk = check(code, s, np.full(16, 2.0, np.float32))
        assert found[5] == np.float32(300) * np.float32(UNIT)
        assert shrunk[5] == 0
        assert p[5, column] == pytest.approx(1, abs=1e-4)

    def test_maxima_that_grow_from_piece_to_piece(self, code: str) -> None:
        s = np.repeat(np.linspace(0, 400, COLUMNS)[None], 16, 0)
        p, found, _, _ = check(code, s, np.full(16, -3.0, np.float32))
        assert (p <= 1024).all()
        np.testing.assert_allclose(found, 400 * UNIT, rtol=1e-6)


class TestInPlace:
    @pytest.mark.parametrize(("code", "above"), [(BFLOAT16, 30), (BFLOAT16, 100), (FLOAT16, 14)])
    def test_large_weights_stay_as_they_are(self, code: str, above: float) -> None:
        s = np.random.default_rng(0).normal(0, 1, (16, COLUMNS))
        s[5, 17] = above / UNIT
        p, found, _, _ = check(code, s, np.full(16, 2.0, np.float32))
        np.testing.assert_array_equal(found, 2)
        assert p[5, 17] == pytest.approx(2.0 ** (above - 2), rel=1e-3)

    @pytest.mark.parametrize("total", [2100.0, 33000.0])
    def test_float16_divides_rows_with_a_large_sum(self, total: float) -> None:
        s = np.random.default_rng(0).normal(0, 1, (16, COLUMNS))
        m, l = np.full(16, 6.0, np.float32), np.ones((16, 4), np.float32)
        l[5, 2] = total
        m[0], l[0], s[0] = -np.inf, 0, -np.inf
        p, found, sums, shrunk = check(FLOAT16, s, m, l)
        power = np.floor(np.log2(total))
        assert found[5] == 6 + power
        assert shrunk[5] == 2.0**-power
        assert 1 <= sums[5, 2] - p[5].reshape(-1, 4, 2)[:, 2].sum() < 2
        np.testing.assert_array_equal(np.delete(found, [0, 5]), 6)
        assert (p[0] == 0).all()

    def test_bfloat16_does_not(self) -> None:
        s = np.random.default_rng(0).normal(0, 1, (16, COLUMNS))
        _, found, _, _ = check(BFLOAT16, s, np.full(16, 6.0, np.float32), np.full((16, 4), 2.0**20, np.float32))
        np.testing.assert_array_equal(found, 6)

    def test_float16_holds_the_weights_of_maxima_that_rise(self) -> None:
        """Each tile's by 9 (13 in powers of two): no weight overflows, and the sums in the end are those of all."""
        s = np.random.default_rng(0).normal(0, 1, (8, 16, COLUMNS))
        s[:, 5, 17] = 13 / UNIT * np.arange(8)
        m, l = np.zeros(16, np.float32), np.full((16, 4), 1.0, np.float32)
        m[:], l[:] = s[0].max(1) * UNIT, 1e-3
        for tile in s:
            p, m, l, _ = weigh(FLOAT16, tile, m, l)
            assert p.max() < 65504
            assert np.isfinite(l).all()
        assert l.sum(1).max() < 65504
        expected = np.log2(np.exp2(s * np.float32(UNIT)).sum((0, 2)))
        np.testing.assert_allclose(np.log2(l.sum(1)) + m, expected, atol=1e-3)

    def test_a_weight_that_float16_may_not_hold_shows_in_the_sum_for_good(self) -> None:
        s = np.random.default_rng(0).normal(0, 1, (16, COLUMNS))
        s[5, 17] = 17 / UNIT
        _, m, l, _ = weigh(FLOAT16, s, np.zeros(16, np.float32), np.ones((16, 4), np.float32))
        assert 65504 < l[5].sum() < 2**18
        for above in (30, 0):
            s[5, 17] = above / UNIT
            _, m, l, _ = weigh(FLOAT16, s, m, l)
            assert not np.isfinite(l[5].max())
        assert (np.delete(l, 5, 0) < 65504).all()

    @pytest.mark.parametrize("code", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
    def test_what_has_overflowed_shows_in_the_sum_for_good(self, code: str) -> None:
        s = np.random.default_rng(0).normal(0, 1, (16, COLUMNS))
        s[5, 17] = 200 / UNIT
        _, m, l, _ = weigh(code, s, np.zeros(16, np.float32), np.ones((16, 4), np.float32))
        assert np.isposinf(l[5].max())
        s[5, 17] = 40 / UNIT
        _, _, l, _ = weigh(code, s, m, l)
        assert not np.isfinite(l[5].max())
        assert np.isfinite(np.delete(l, 5, 0)).all()

    @pytest.mark.parametrize("code", [BFLOAT16, FLOAT16], ids=["bfloat16", "float16"])
    def test_a_search_finds_each_maximum(self, code: str) -> None:
        s = np.random.default_rng(0).normal(0, 1, (16, COLUMNS))
        s[5, 17] = 300
        m = np.linspace(-5, 300, 16).astype(np.float32)
        p, found, _, _ = check(code, s, m, search=1)
        np.testing.assert_allclose(found, np.maximum(m, s.astype(np.float32).max(1) * np.float32(UNIT)), rtol=1e-6)
        assert (p <= 1 + 1e-5).all()


@pytest.mark.parametrize("moved", [False, True])
def test_shrink(moved: bool) -> None:
    o = np.random.default_rng(0).normal(0, 1, (16, COLUMNS)).astype(np.float32)
    by = np.ones((16, 4), np.float32)
    if moved:
        by[9] = 0.25
    count = COLUMNS // 2
    outputs = ptx.run(weighing.shrinking.fn(count), count, [*threads(o), *by_row(by, count)])
    np.testing.assert_array_equal(tile_of(outputs), o * by[:, :1])
