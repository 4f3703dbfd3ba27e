"""flash_attn_with_kvcache: each sequence alone, token by token, against the definition; caches bit for bit."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from cached import DIM, HEADS, KINDS, Setting, expected
from places import every_place
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import flashtile
from flashtile.kvcache import attend, reports, varlen
from flashtile.kvcache import cache as cache_module

NO_DEFAULT = inspect.Parameter.empty
SIGNATURE = {
    "q": NO_DEFAULT, "k_cache": NO_DEFAULT, "v_cache": NO_DEFAULT, "k": None, "v": None, "rotary_cos": None,
    "rotary_sin": None, "cache_seqlens": None, "cache_batch_idx": None, "cache_leftpad": None, "block_table": None,
    "softmax_scale": None, "causal": False, "window_size": (-1, -1), "softcap": 0.0, "rotary_interleaved": True,
    "alibi_slopes": None, "num_splits": 0, "return_softmax_lse": False,
}  # fmt: skip


def test_signature_is_exactly_the_original() -> None:
    parameters = inspect.signature(flashtile.flash_attn_with_kvcache).parameters.values()
    assert {p.name: p.default for p in parameters} == SIGNATURE
    assert [p.name for p in parameters] == list(SIGNATURE)
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("backend", ["reference", "blocked"])
def test_against_the_definition(name: str, backend: str) -> None:
    setting = Setting(KINDS[name], torch.float64)
    out, lse, caches = expected(setting)
    with flashtile.use_backend(backend):
        result, result_lse = flashtile.flash_attn_with_kvcache(**setting.arguments(), return_softmax_lse=True)
    torch.testing.assert_close(result, out, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(result_lse, lse, rtol=1e-9, atol=1e-10)
    assert result_lse.is_contiguous()
    for cache, wanted in zip(setting.caches, caches, strict=True):
        torch.testing.assert_close(cache, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)


FEW = ("append-3", "append-pages", "leftpad", "rotary-rows", "alibi-batch-pages")


@every_place
@pytest.mark.parametrize("name", FEW)
def test_every_backend(name: str, backend: str, device: str) -> None:
    setting = Setting(KINDS[name], torch.float32)
    out, lse, caches = expected(setting)
    arguments = {name: moved(value, device) for name, value in setting.arguments().items()}
    with flashtile.use_backend(backend):
        result, result_lse = flashtile.flash_attn_with_kvcache(**arguments, return_softmax_lse=True)
    torch.testing.assert_close(result.cpu(), out.float())
    torch.testing.assert_close(result_lse.cpu(), lse.float())
    for name_, wanted in zip(("k_cache", "v_cache"), caches, strict=True):
        torch.testing.assert_close(arguments[name_].cpu(), wanted, equal_nan=True)


def moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, Tensor) and value.ndim else value


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["append-3", "append-pages", "append-rows"])
def test_the_cache_holds_what_was_given_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    setting = Setting(KINDS[name], dtype)
    _, _, caches = expected(setting)
    assert flashtile.flash_attn_with_kvcache(**setting.arguments()).dtype == dtype
    for cache, wanted in zip(setting.caches, caches, strict=True):
        assert torch.equal(cache.nan_to_num(-7.0), wanted.nan_to_num(-7.0))


def test_a_rotated_key_is_rounded_once() -> None:
    """In bfloat16 the cached key is the nearest to the exact product of what was given."""
    setting = Setting(KINDS["rotary-halves"], torch.bfloat16)
    _, _, (keys, _) = expected(setting)
    flashtile.flash_attn_with_kvcache(**setting.arguments())
    differs = setting.caches[0].nan_to_num() != keys.nan_to_num()
    assert differs.double().mean() < 0.01  # a tie in float64 may fall to the other side in float32


def test_a_wrong_token_in_the_cache_is_noticed() -> None:
    setting = Setting(KINDS["append-pages"], torch.float64)
    out, _, _ = expected(setting)
    setting.caches[1][setting.place(2, 4)] += 0.01
    result = flashtile.flash_attn_with_kvcache(**setting.arguments())
    with pytest.raises(AssertionError, match="not close"):
        torch.testing.assert_close(result, out)


class NoHostReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Raises where an operation would wait for a device to read a number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contents are out of reach, as a GPU's are: nothing is looked at before the call."""
    for module in (reports, cache_module, attend, varlen):
        monkeypatch.setattr(module, "on_host", lambda device: False)
    monkeypatch.setattr(reports, "_flags", {})


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("name", KINDS)
def test_nothing_waits_for_a_device(name: str) -> None:
    setting = Setting(KINDS[name], torch.float64)
    out, _, caches = expected(setting)
    arguments = setting.arguments()
    if "window_size" in arguments:  # a tensor of sides is read on the host, as the original reads it
        arguments["window_size"] = tuple(int(side) for side in arguments["window_size"])
    with NoHostReads():
        result = flashtile.flash_attn_with_kvcache(**arguments)
    torch.testing.assert_close(result, out, rtol=1e-9, atol=1e-10)
    for cache, wanted in zip(setting.caches, caches, strict=True):
        torch.testing.assert_close(cache, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)
    flashtile.check_device_errors("cpu")


def test_a_host_read_is_noticed() -> None:
    with NoHostReads(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(2).sum().item()


BAD_CONTENTS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    # id: (kind, changed arguments, words of the message)
    "too-long": ("plain", {"cache_seqlens": [5, 0, 13]}, ("cache_seqlens", "13", "0 to 12")),
    "negative": ("plain", {"cache_seqlens": [5, -1, 3]}, ("cache_seqlens", "-1")),
    "no-room-for-new": ("append-3", {"cache_seqlens": [5, 0, 10]}, ("cache_seqlens", "10", "0 to 9", "less 3 new")),
    "no-such-row": ("rows", {"cache_batch_idx": [3, 0, 4]}, ("cache_batch_idx", "4", "0 to 3")),
    "negative-row": ("rows", {"cache_batch_idx": [3, 0, -1]}, ("cache_batch_idx", "-1")),
    "negative-leftpad": ("leftpad", {"cache_leftpad": [2, -1, 0]}, ("cache_leftpad", "-1")),
    "beyond-the-table": ("pages-of-4", {"cache_seqlens": [5, 0, 13]}, ("cache_seqlens", "13", "0 to 12")),
    "no-such-page": ("pages-of-4", {"block_table": [[0, 1, -1], [-1] * 3, [2, 3, 99]]}, ("block_table", "99")),
    "page-missing-for-new": (
        "append-pages",
        {"block_table": [[0, 1, 2, 3, -1, -1], [4, -1, -1, -1, -1, -1], [5, 6, 7, 8, 9, 10]]},
        ("block_table", "-1"),
    ),
    "beyond-the-rotary-tables": (
        "rotary",
        {"q": torch.zeros(3, 12, HEADS, DIM), "cache_seqlens": [5, 0, 9]},
        ("rotary_cos", "9", "at most 8 tokens"),
    ),
}


def with_bad_contents(name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    kind, changes, words = BAD_CONTENTS[name]
    arguments = Setting(KINDS[kind], torch.float32).arguments()
    tensors = {k: v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.int32) for k, v in changes.items()}
    return {**arguments, **tensors}, words


@pytest.mark.parametrize("name", BAD_CONTENTS)
def test_bad_contents_are_refused_before_anything_is_written(name: str) -> None:
    arguments, words = with_bad_contents(name)
    before = arguments["k_cache"].clone()
    with pytest.raises(ValueError) as caught:
        flashtile.flash_attn_with_kvcache(**arguments)
    assert all(word in str(caught.value) for word in words), caught.value
    torch.testing.assert_close(arguments["k_cache"], before, equal_nan=True)


@pytest.mark.usefixtures("_as_on_a_gpu")
@pytest.mark.parametrize("name", BAD_CONTENTS)
def test_bad_contents_on_a_gpu_are_reported_by_the_next_call(name: str) -> None:
    """The call itself stays within bounds: an index beyond a tensor would raise an IndexError here."""
    arguments, words = with_bad_contents(name)
    flashtile.flash_attn_with_kvcache(**arguments)
    good = Setting(KINDS["plain"], torch.float32).arguments()
    with pytest.raises(ValueError, match=f"earlier flashtile call.*{words[0]}: got a value out of range"):
        flashtile.flash_attn_with_kvcache(**good)
    flashtile.flash_attn_with_kvcache(**good)  # reported once
    flashtile.flash_attn_with_kvcache(**arguments)
    with pytest.raises(ValueError, match=words[0]):
        flashtile.check_device_errors("cpu")


@pytest.mark.usefixtures("_as_on_a_gpu")
def test_on_a_gpu_a_token_beyond_the_cache_overwrites_nothing() -> None:
    arguments, _ = with_bad_contents("no-room-for-new")
    last = arguments["k_cache"][2, 9].clone()
    flashtile.flash_attn_with_kvcache(**arguments)
    torch.testing.assert_close(arguments["k_cache"][2, 9], last, equal_nan=True)
    torch.testing.assert_close(arguments["k_cache"][2, 10], arguments["k"][2, 0])
    with pytest.raises(ValueError, match="cache_seqlens"):
        flashtile.check_device_errors()


def cases_of_bad_arguments() -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    q, cache, new = (torch.zeros(2, n, h, 8) for n, h in ((1, 4), (6, 2), (1, 2)))
    held = torch.tensor([1, 2], dtype=torch.int32)
    tables, longer = torch.zeros(6, 4), cache.repeat(1, 2, 1, 1)
    base = {"q": q, "k_cache": cache, "v_cache": cache.clone(), "cache_seqlens": held}
    appended = {**base, "k": new, "v": new}
    rotated = {**appended, "rotary_cos": tables, "rotary_sin": tables}
    return {
        "q-rank": ({**base, "q": q[0]}, ValueError, "q: got shape"),
        "q-none": ({**base, "q": None}, TypeError, "q: got NoneType"),
        "cache-rank": ({**base, "k_cache": cache[0]}, ValueError, "k_cache: got shape"),
        "cache-rank-without-lengths": ({**base, "k_cache": cache[0], "cache_seqlens": 1}, ValueError, "k_cache: got"),
        "cache-dtype": ({**base, "v_cache": cache.double()}, TypeError, "v_cache: got torch.float64"),
        "cache-shapes": ({**base, "v_cache": cache[:, :5]}, ValueError, "v_cache: got shape"),
        "cache-dim": ({**base, "k_cache": cache[..., :4]}, ValueError, "k_cache: got head_dim 4"),
        "cache-batch": ({**base, "k_cache": cache[:1], "v_cache": cache[:1]}, ValueError, "k_cache: got 1 sequences"),
        "heads": ({**base, "q": torch.zeros(2, 1, 3, 8)}, ValueError, "k_cache: got 2 heads, expected a divisor of 3"),
        "lengths-dtype": ({**base, "cache_seqlens": held.float()}, TypeError, "cache_seqlens: got torch.float32"),
        "lengths-shape": ({**base, "cache_seqlens": held[:1]}, ValueError, "cache_seqlens: got shape (1,)"),
        "lengths-type": ({**base, "cache_seqlens": 1.5}, TypeError, "cache_seqlens: got float"),
        "lengths-number": ({**base, "cache_seqlens": 7}, ValueError, "cache_seqlens: got 7, expected 0 to 6"),
        "lengths-and-new": ({**appended, "cache_seqlens": 6}, ValueError, "cache_seqlens: got 6, expected 0 to 5"),
        "new-without-lengths": ({**appended, "cache_seqlens": None}, ValueError, "cache_seqlens: got None"),
        "k-without-v": ({**appended, "v": None}, ValueError, "v: got None beside k"),
        "v-without-k": ({**appended, "k": None}, ValueError, "k: got None beside v"),
        "k-shape": ({**appended, "k": new[:1]}, ValueError, "k: got shape"),
        "v-shape": ({**appended, "v": torch.zeros(2, 2, 2, 8)}, ValueError, "v: got shape"),
        "k-dtype": ({**appended, "k": new.half()}, TypeError, "k: got torch.float16"),
        "k-too-long": ({**appended, "k": longer, "v": longer}, ValueError, "k: got 12 new tokens"),
        "cos-without-sin": ({**rotated, "rotary_sin": None}, ValueError, "rotary_sin: got None"),
        "rotary-without-new": ({**rotated, "k": None, "v": None}, ValueError, "rotary_cos: got a tensor without k"),
        "rotary-short": ({**rotated, "rotary_cos": tables[:5]}, ValueError, "rotary_cos: got shape (5, 4)"),
        "rotary-wide": ({**rotated, "rotary_cos": torch.zeros(6, 5)}, ValueError, "rotary_cos: got shape (6, 5)"),
        "rotary-integers": ({**rotated, "rotary_sin": tables.int()}, TypeError, "rotary_sin: got torch.int32"),
        "rotary-differ": ({**rotated, "rotary_sin": tables[:, :2]}, ValueError, "rotary_sin: got shape (6, 2)"),
        "interleaved": ({**rotated, "rotary_interleaved": 1}, TypeError, "rotary_interleaved: got int"),
        "rows-dtype": ({**base, "cache_batch_idx": held.half()}, TypeError, "cache_batch_idx: got torch.float16"),
        "rows-and-pages": (
            {**base, "cache_batch_idx": held, "block_table": held[:, None]}, ValueError, "beside a block_table",
        ),
        "leftpad-shape": ({**base, "cache_leftpad": held[:1]}, ValueError, "cache_leftpad: got shape"),
        "table-rank": ({**base, "block_table": held}, ValueError, "block_table: got shape"),
        "table-batch": ({**base, "block_table": held[None]}, ValueError, "block_table: got shape"),
        "table-type": ({**base, "block_table": [[0]]}, TypeError, "block_table: got list"),
        "slopes": ({**base, "alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes: got shape"),
        "scale": ({**base, "softmax_scale": "1"}, TypeError, "softmax_scale: got str"),
        "softcap": ({**base, "softcap": -1.0}, ValueError, "softcap: got -1.0"),
        "window": ({**base, "window_size": (1, 2, 3)}, ValueError, "window_size: got 3 values"),
        "causal": ({**base, "causal": 1}, TypeError, "causal: got int"),
        "splits": ({**base, "num_splits": -1}, ValueError, "num_splits: got -1"),
        "splits-type": ({**base, "num_splits": 1.0}, TypeError, "num_splits: got float"),
        "return": ({**base, "return_softmax_lse": 1}, TypeError, "return_softmax_lse: got int"),
    }  # fmt: skip


BAD_ARGUMENTS = cases_of_bad_arguments()


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_named(name: str) -> None:
    arguments, kind, words = BAD_ARGUMENTS[name]
    with pytest.raises(kind) as caught:
        flashtile.flash_attn_with_kvcache(**arguments)
    assert words in str(caught.value), caught.value


def test_nothing_to_compute() -> None:
    setting = Setting(KINDS["append-3"], torch.float32)
    arguments = setting.arguments() | {"q": setting.q[:, :0]}
    assert flashtile.flash_attn_with_kvcache(**arguments).shape == (3, 0, HEADS, DIM)
    none = {name: value[:0] if isinstance(value, Tensor) else value for name, value in setting.arguments().items()}
    out, lse = flashtile.flash_attn_with_kvcache(**none, return_softmax_lse=True)
    assert (out.shape, lse.shape) == ((0, 3, HEADS, DIM), (0, HEADS, 3))
    nowhere = setting.caches[0][:, :0]
    for table in (None, torch.zeros(3, 0, dtype=torch.int32)):
        out, lse = flashtile.flash_attn_with_kvcache(
            setting.q, nowhere, nowhere, block_table=table, return_softmax_lse=True
        )
        assert not bool(out.any())
        assert bool((lse == torch.inf).all())


def test_the_result_carries_no_gradient_as_in_the_original() -> None:
    setting = Setting(KINDS["append-3"], torch.float32)
    arguments = {n: v.requires_grad_() if n in ("q", "k", "v") else v for n, v in setting.arguments().items()}
    out = flashtile.flash_attn_with_kvcache(**arguments)
    assert not out.requires_grad
    assert not arguments["k_cache"].requires_grad


def test_a_contiguous_cache_is_not_copied() -> None:
    """Of a cache of 8 MB, a call with one query allocates less than 1 MB: it is read where it lies."""
    cache, values = torch.randn(2, 2, 4096, 2, 64)
    q = torch.randn(2, 1, 4, 64)
    held = torch.tensor([100, 130], dtype=torch.int32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        flashtile.flash_attn_with_kvcache(q, cache, values, cache_seqlens=held)
    allocated = sum(event.self_cpu_memory_usage for event in seen.events() if event.self_cpu_memory_usage > 0)
    assert allocated < 2**20, allocated


def test_num_splits_changes_nothing() -> None:
    results = []
    for splits in (0, 1, 4):
        torch.manual_seed(1)
        kind = replace(KINDS["plain"], options={"num_splits": splits})
        results.append(flashtile.flash_attn_with_kvcache(**Setting(kind, torch.float32).arguments()))
    assert all(torch.equal(result, results[0]) for result in results)


def test_compiled_code_calls_it_between_its_graphs() -> None:
    setting = Setting(KINDS["append-pages"], torch.float32)
    out, _, caches = expected(setting)
    arguments = setting.arguments()
    compiled = torch.compile(
        lambda q: flashtile.flash_attn_with_kvcache(**{**arguments, "q": q * 1}) + 1, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(setting.q), out.float() + 1)
    torch.testing.assert_close(setting.caches, caches, equal_nan=True)
