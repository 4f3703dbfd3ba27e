"""What is particular to the blocked backend: its tiles, its memory, its delegation to PyTorch, its moving reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flashtile
from flashtile.backends import blocked
from flashtile.backends.blocked import configs, intervals, native, scores
from flashtile.backends.blocked.intervals import Band, Intervals, Table, Tile, cover
from flashtile.dropout import keep_mask, keep_tile
from flashtile.masks import Causal, Chunked, Documents, Mask, Prefix, Window, interval_rows, lower
from flashtile.problem import Call, Problem
from flashtile.testing.cases import CASES, Case
from flashtile.testing.inputs import build
from flashtile.testing.run import evaluate, run_case
from flashtile.validation import describe

# The package exports functions of the same names.
FORWARD, BACKWARD = (import_module(f"flashtile.backends.blocked.{name}") for name in ("forward", "backward"))

SMALL = configs.Config(units=2, rows=24, keys=16, edge=8)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tiles even where lengths are small, and no call handed to PyTorch."""
    use(monkeypatch, SMALL)
    monkeypatch.setattr(native, "serves", lambda problem: False)


def use(monkeypatch: pytest.MonkeyPatch, config: configs.Config, grid: int = 8) -> None:
    monkeypatch.setattr(intervals, "GRID", grid)
    monkeypatch.setattr(FORWARD, "pick_forward", lambda problem: config)
    monkeypatch.setattr(BACKWARD, "pick_backward", lambda problem: config)


def qkv(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(shape, dtype=dtype) for _ in range(3))
    return q, k, v


# Which tiles


def intervals_of(mask: Mask, rows: int, columns: int) -> Intervals:
    distances = mask.distances()
    if distances is not None:
        return Band(rows, columns, *distances)
    lo, hi = interval_rows(lower(mask, rows, columns), rows, columns)
    return Table(lo[0], hi[0], columns)


def all_tiles(mask: Intervals, rows: int, size: int, edge: int) -> list[Tile]:
    back = mask.transposed()
    return [
        tile
        for row in range(0, mask.rows, rows)
        for tile in cover(mask, back, row, min(row + rows, mask.rows), size, edge)
    ]


def check_cover(mask: Intervals, seen: Tensor, tiles: list[Tile]) -> None:
    """Every visible pair lies in exactly one tile; every tile shows something; what is called full is."""
    covered = torch.zeros_like(seen, dtype=torch.int64)
    for tile in tiles:
        part = seen[tile.row : tile.row_end, tile.column : tile.column_end]
        assert part.any(), f"{tile} is fully masked"
        assert tile.partial or part.all(), f"{tile} is not full"
        assert not tile.partial or torch.equal(mask.seen(tile, torch.device("cpu")), part), (
            f"{tile} is masked otherwise"
        )
        covered[tile.row : tile.row_end, tile.column : tile.column_end] += 1
    assert covered.max() <= 1, "a pair is computed twice"
    assert (covered[seen] == 1).all(), "a visible pair is not computed"


MASKS = st.one_of(
    st.builds(Window, st.one_of(st.none(), st.integers(-30, 60)), st.one_of(st.none(), st.integers(-30, 60))),
    st.builds(Prefix, st.integers(0, 80)),
    st.builds(Chunked, st.integers(1, 40), st.integers(0, 12)),
    st.builds(lambda lengths: Documents(tuple(lengths)) & Causal(), st.lists(st.integers(0, 40), max_size=5)),
)


@given(
    mask=MASKS, rows=st.integers(1, 90), columns=st.integers(1, 90), step=st.integers(1, 50), size=st.integers(1, 50)
)
def test_tiles_cover_what_is_seen_and_nothing_else(mask: Mask, rows: int, columns: int, step: int, size: int) -> None:
    lo, hi = (bound[0, :, None] for bound in interval_rows(lower(mask, rows, columns), rows, columns))
    seen = (torch.arange(columns) >= lo) & (torch.arange(columns) < hi)
    forward = intervals_of(mask, rows, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "GRID", 8)
        check_cover(forward, seen, all_tiles(forward, step, size, max(size // 2, 1)))
        backward = forward.transposed()
        check_cover(backward, seen.T, all_tiles(backward, step, size, max(size // 2, 1)))


@pytest.mark.parametrize("damage", ["missing", "twice", "masked", "called full"])
def test_the_cover_checker_rejects_wrong_tiles(damage: str) -> None:
    mask = intervals_of(Causal(), 128, 128)
    seen = torch.ones(128, 128, dtype=torch.bool).tril()
    tiles = all_tiles(mask, 64, 64, 64)
    check_cover(mask, seen, tiles)
    if damage == "missing":
        tiles.pop()
    elif damage == "twice":
        tiles.append(tiles[0])
    elif damage == "masked":
        tiles.append(Tile(0, 64, 64, 128, True))
    else:
        tiles[0] = tiles[0]._replace(partial=False)
    with pytest.raises(AssertionError):
        check_cover(mask, seen, tiles)


@pytest.mark.parametrize(
    ("mask", "at_most"),
    [(Causal(), 1.15), (Window(511, 0), 1.5), (Chunked(512), 1.0), (Documents((1000, 3000, 96)) & Causal(), 1.25)],
    ids=["causal", "window", "chunked", "documents"],
)
def test_few_hidden_scores_are_computed(mask: Mask, at_most: float) -> None:
    """At the sizes that are shipped, the scores that are computed are little more than those that are seen."""
    length = 4096
    lo, hi = interval_rows(lower(mask, length, length), length, length)
    visible = int((hi - lo).clamp(min=0).sum())
    for config in (configs.MANY_HEADS, configs.WIDE):
        tiles = all_tiles(intervals_of(mask, length, length), config.rows, config.keys, config.edge)
        computed = sum((t.row_end - t.row) * (t.column_end - t.column) for t in tiles)
        assert visible <= computed <= at_most * visible


def test_hidden_tiles_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products that a call really makes, forward and backward, are those of the tiles."""
    made: list[int] = []
    product = scores.product

    def counted(result: Tensor, left: Tensor, right: Tensor, alpha: float = 1.0) -> Tensor:
        made.append(left.shape[-2] * left.shape[-1] * right.shape[-1])
        return product(result, left, right, alpha)

    for module in (scores, FORWARD, BACKWARD):
        monkeypatch.setattr(module, "product", counted)
    q, k, v = qkv(1, 1024, 1, 16)
    q.requires_grad_()
    out = flashtile.attention(q, k, v, window=(63, 0), backend="blocked")
    forward, made[:] = sum(made), []
    assert forward <= 2 * 16 * 1024 * 400  # two products of 16 columns; 1024 keys a row would be 2.5 times this
    out.sum().backward()
    assert sum(made) <= 5 * 16 * 1024 * 600


# Results do not depend on how they are cut


CUTS = [
    configs.Config(units=1, rows=8, keys=8, edge=8),
    configs.Config(units=3, rows=40, keys=16, edge=8),
    configs.Config(units=8, rows=512, keys=512, edge=128),
]
CUT_CASES = ["gqa-causal-odd", "window-both", "documents-causal", "everything", "everything-table", "everything-varlen"]


def results(case: Case) -> dict[str, Tensor]:
    return evaluate(case, build(case, torch.float64, "cpu", 3), "blocked")


@pytest.mark.parametrize("case", [case for case in CASES if case.id in CUT_CASES], ids=str)
def test_tile_sizes_do_not_change_results(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = results(case)
    for cut in CUTS:
        use(monkeypatch, cut)
        for name, result in results(case).items():
            torch.testing.assert_close(result, expected[name], rtol=1e-11, atol=1e-12, msg=f"{name} of {case} at {cut}")


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if not case.varlen], ids=str)
def test_small_tiles_stay_within_the_error_budget(case: Case, dtype: torch.dtype) -> None:
    run_case(case, "blocked", dtype)


@pytest.mark.usefixtures("small_tiles")
def test_repeats_are_bitwise_equal() -> None:
    for case in (case for case in CASES if case.id in CUT_CASES):
        first, second = results(case), results(case)
        for name in first:
            assert torch.equal(first[name], second[name]), f"{name} of {case}"


# The reference m


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    s = scale * torch.einsum("bmhd,bnhd->bhmn", q.double(), k.double())
    return torch.einsum("bhmn,bnhd->bmhd", s.softmax(-1), v.double()), s.logsumexp(-1)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("rise", [30.0, -30.0, 1000.0, -1000.0])
def test_scores_that_climb_or_fall_from_tile_to_tile(rise: float) -> None:
    q, k, v = qkv(1, 40, 2, 8)
    q, k = q.abs() + 0.1, k.abs() * torch.linspace(0, 1, 40, dtype=q.dtype)[:, None, None] * rise
    out, lse = flashtile.attention(q, k, v, scale=1.0, return_lse=True, backend="blocked")
    expected_out, expected_lse = exact(q, k, v, 1.0)
    torch.testing.assert_close(out, expected_out, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-9)


@pytest.mark.usefixtures("small_tiles")
def test_rows_that_see_nothing_at_first_and_little_later() -> None:
    """Their reference must fall to scores that 2^score alone could not hold."""
    q, k, v = qkv(1, 24, 1, 8)
    bias = torch.full((24, 24), -3000.0, dtype=q.dtype)
    bias[:, :16] = -torch.inf
    out, lse = flashtile.attention(q, k, v, bias=bias, return_lse=True, backend="blocked")
    expected_out, expected_lse = exact(q, k[:, 16:], v[:, 16:], 8**-0.5)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse - 3000)


def test_bounded_scores_need_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path without a maximum is taken where scores are small and keys many, and gives what the other gives."""
    followed: list[int] = []
    follow = FORWARD._follow
    monkeypatch.setattr(FORWARD, "_follow", lambda *tensors: (followed.append(1), follow(*tensors)))
    q, k, v = qkv(1, 600, 2, 32)
    bounded = flashtile.attention(q, k, v, return_lse=True, backend="blocked")
    assert not followed
    monkeypatch.setattr(FORWARD, "_BOUND", 0.0)
    checked = flashtile.attention(q, k, v, return_lse=True, backend="blocked")
    assert followed
    for one, other in zip(bounded, checked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_large_scores_are_never_called_bounded() -> None:
    q, k, v = qkv(1, 600, 1, 32, dtype=torch.float32)
    out, lse = flashtile.attention(q, k, v, scale=30.0, window=(500, 500), return_lse=True, backend="blocked")
    assert out.isfinite().all()
    assert lse.isfinite().all()
    assert lse.max() > 60


def test_hidden_keys_may_hold_anything() -> None:
    q, k, v = qkv(1, 300, 2, 32)
    out, lse = flashtile.attention(q, k, v, window=(400, 0), return_lse=True, backend="blocked")
    for garbage in (math.nan, math.inf, -math.inf):
        k[:, 200:] = garbage
        again, lse_again = flashtile.attention(q, k, v, window=(400, 0), return_lse=True, backend="blocked")
        assert torch.equal(again[:, :200], out[:, :200])
        assert torch.equal(lse_again[..., :200], lse[..., :200])
        assert not again[:, 200:].isfinite().any()


# PyTorch's own kernel


PLAIN = Problem(1, 600, 600, 4, 4, 64, 64, torch.float32, "cpu", scale=0.125)


def test_plain_float32_calls_go_to_pytorch() -> None:
    assert native.serves(PLAIN)
    assert native.serves(replace(PLAIN, window_right=0))
    assert native.serves(replace(PLAIN, q_len=17))
    assert native.serves(replace(PLAIN, q_len=64, k_len=64, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "change",
    [
        {"window_right": 0, "q_len": 17},
        {"window_right": 1},
        {"window_left": 5},
        {"table": True},
        {"scale": 0.0},
        {"scale": -0.3},
        {"softcap": 1.0},
        {"alibi": True},
        {"bias": "additive", "bias_shape": (1, 1, 1, 1)},
        {"bias": "boolean", "bias_shape": (1, 1, 1, 1)},
        {"sinks": True},
        {"dropout_p": 0.1},
        {"kv_heads": 2},
        {"v_dim": 32},
        {"varlen": True, "total_q": 600, "total_k": 600},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"dtype": torch.float64},
        {"device": "mps"},
    ],
    ids=str,
)
def test_other_calls_do_not(change: dict[str, object]) -> None:
    assert not native.serves(replace(PLAIN, **change))


@pytest.mark.parametrize("causal", [False, True])
def test_pytorch_computes_the_same(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(1)
        q, k, v = (t.requires_grad_() for t in qkv(2, 70, 3, 40, dtype=torch.float32))
        out, lse = flashtile.attention(q, k, v, causal=causal, scale=0.3, return_lse=True, backend="blocked")
        return [out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    delegated = run()
    monkeypatch.setattr(native, "serves", lambda problem: False)
    for one, other in zip(delegated, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scales_that_pytorch_gets_wrong(scale: float) -> None:
    """Its kernel hides keys before it scales them; should this test's last line fail, it has learned better."""
    q, k, v = qkv(1, 40, 2, 16, dtype=torch.float32)
    blocked_out, expected = (
        flashtile.attention(q, k, v, causal=True, scale=scale, backend=name) for name in ("blocked", "reference")
    )
    torch.testing.assert_close(blocked_out, expected)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    theirs = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, True, scale=scale)[0]
    assert not theirs.isfinite().all()


def test_pytorch_is_not_asked_for_the_gradient_of_lse() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(1, 33, 2, 16, dtype=torch.float32))
    out, lse = flashtile.attention(q, k, v, return_lse=True, backend="blocked")
    grads = torch.autograd.grad((out.sum() + lse.sin().sum()), (q, k, v))
    s = torch.einsum("bmhd,bnhd->bhmn", q, k) / 4
    expected = torch.einsum("bhmn,bnhd->bmhd", s.softmax(-1), v).sum() + s.logsumexp(-1).sin().sum()
    for got, want in zip(grads, torch.autograd.grad(expected, (q, k, v)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_pytorch_shows_infinities_and_nans_as_the_reference_does(
    dtype: torch.dtype, value: float, causal: bool
) -> None:
    for place in range(3):
        tensors = qkv(1, 70, 2, 16, dtype=dtype)
        tensors[place][0, 37, 1, 3] = value
        got, want = (
            flashtile.attention(*tensors, causal=causal, return_lse=True, backend=name)
            for name in ("blocked", "reference")
        )
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one.isnan(), other.isnan())
            assert torch.equal(one.isinf(), other.isinf())


# Memory


class Largest(TorchDispatchMode):
    """The elements of the largest memory that any operation inside returns."""

    elements = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def largest(length: int, dtype: torch.dtype, kv_heads: int = 4, **features: object) -> int:
    q = torch.randn(1, length, 4, 8, dtype=dtype)
    k, v = (torch.randn(1, length, kv_heads, 8, dtype=dtype) for _ in range(2))
    call = Call(q, k, v, scale=0.3, **features)
    problem = describe(call)
    grads = tuple(torch.empty_like(t) for t in (q, k, v))
    with Largest() as found:
        out, lse = blocked.forward(problem, call)
        blocked.backward(problem, call, out, lse, torch.ones_like(out), None, grads, False)
    return found.elements


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "features",
    [{}, {"window_right": 0}, {"softcap": 2.0}, {"dropout_p": 0.1, "rng": torch.tensor([1, 2])}, {"kv_heads": 1}],
    ids=["full", "causal", "softcap", "dropout", "gqa"],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_no_memory_grows_with_the_square_of_the_length(features: dict[str, object], dtype: torch.dtype) -> None:
    for length in (256, 512):
        assert largest(length, dtype, **features) <= 4 * length * (8 + scores.SPLIT)  # a head's rows, all heads at once


def test_the_memory_check_sees_an_expanded_score_matrix() -> None:
    with Largest() as found:
        q = torch.randn(64, 8)
        _ = (q @ q.T).softmax(-1) @ q
    assert found.elements == 64 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, (5, 5)], ids=["delegated", "tiles"])
def test_out_is_written_in_place(dtype: torch.dtype, window: tuple[int, int] | None) -> None:
    q, k, v = qkv(2, 50, 3, 16, dtype=dtype)
    expected = flashtile.attention(q, k, v, window=window, backend="blocked")
    for out in (torch.empty_like(q), torch.empty(2, 3, 50, 32, dtype=dtype)[..., ::2].transpose(1, 2)):
        assert flashtile.attention(q, k, v, window=window, out=out, backend="blocked") is out
        assert torch.equal(out, expected)


# Dtypes and dropout


@pytest.mark.parametrize("case", [case for case in CASES if case.id in ("causal-257", "gqa", "softcap")], ids=str)
def test_cpus_without_bfloat16_compute_it_in_float32(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "serves", lambda problem: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False, raising=False)
    assert configs.working_dtype(replace(PLAIN, dtype=torch.bfloat16)) == torch.float32
    run_case(case, "blocked", torch.bfloat16)


def test_float16_is_widened_and_float64_kept() -> None:
    assert configs.working_dtype(replace(PLAIN, dtype=torch.float16)) == torch.float32
    assert configs.working_dtype(replace(PLAIN, dtype=torch.float64)) == torch.float64


@given(
    p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    row=st.integers(0, 70),
    rows=st.integers(1, 40),
    column=st.integers(0, 70),
    columns=st.integers(1, 40),
)
def test_dropout_of_a_tile_is_that_of_its_elements(p: float, row: int, rows: int, column: int, columns: int) -> None:
    rng = torch.tensor([-5_000_000_000, 2**62 + 3])
    batch_head = torch.tensor([[0, 3], [7, 2**33 + 5]])
    tile = keep_tile(rng, p, batch_head, (row, row + rows), (column, column + columns))
    row_index, column_index = torch.arange(row, row + rows)[:, None], torch.arange(column, column + columns)
    assert torch.equal(tile, keep_mask(rng, p, batch_head[..., None, None], row_index, column_index))


# Configurations


@pytest.mark.parametrize("pick", [configs.pick_forward, configs.pick_backward])
def test_tiles_follow_heads_and_dtype(pick: Callable[[Problem], configs.Config]) -> None:
    many = replace(PLAIN, dtype=torch.bfloat16)
    assert pick(many) == configs.MANY_HEADS
    assert pick(replace(many, q_heads=1, kv_heads=1, batch=64)) == configs.MANY_HEADS
    assert pick(replace(many, q_heads=32, kv_heads=1)) == configs.FEW_HEADS
    assert pick(replace(many, batch=64, kv_heads=1, varlen=True)) == configs.FEW_HEADS
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert pick(replace(many, dtype=dtype)) == configs.WIDE


@pytest.mark.parametrize("name", ["units", "rows", "keys", "edge"])
def test_a_size_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
        replace(SMALL, **{name: 0})
