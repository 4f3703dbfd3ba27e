"""What flash_attn's signatures cost over the native call: no copy of q, k and v, and microseconds on the host."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from host_time import added_host_time, computes_nothing
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import flashtile
from flashtile.integrations.flash_attn import functions

LENGTH, HEADS, DIM = 512, 4, 64
STARTS = torch.tensor([0, 100, 512], dtype=torch.int32)
SEPARATE = [torch.randn(1, LENGTH, HEADS, DIM) for _ in range(3)]
PACKED = torch.stack(SEPARATE, 2)

Action = Callable[[], object]
# name: (through flash_attn's signature, the native call on the same memory)
CALLS: dict[str, tuple[Action, Action]] = {
    "dense": (
        lambda: flashtile.flash_attn_func(*SEPARATE, causal=True),
        lambda: flashtile.attention(*SEPARATE, causal=True),
    ),
    "lse": (
        lambda: flashtile.flash_attn_func(*SEPARATE, return_attn_probs=True),
        lambda: flashtile.attention(*SEPARATE, return_lse=True),
    ),
    "kv": (
        lambda: flashtile.flash_attn_kvpacked_func(SEPARATE[0], PACKED[:, :, 1:], window_size=(64, 0)),
        lambda: flashtile.attention(SEPARATE[0], *PACKED[:, :, 1:].unbind(2), window=(64, 0)),
    ),
    "qkv": (
        lambda: flashtile.flash_attn_qkvpacked_func(PACKED, softcap=5.0),
        lambda: flashtile.attention(*PACKED.unbind(2), softcap=5.0),
    ),
    "varlen": (
        lambda: flashtile.flash_attn_varlen_func(*(t[0] for t in SEPARATE), STARTS, STARTS, 412, 412, causal=True),
        lambda: flashtile.attention_varlen(*(t[0] for t in SEPARATE), STARTS, STARTS, 412, 412, causal=True),
    ),
}


def allocated(action: Action) -> int:
    """Bytes that one call asks for in all, whether or not it gives them back."""
    action()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = action()
    del result
    return sum(max(event.self_cpu_memory_usage, 0) for event in seen.events())


@pytest.mark.parametrize("name", CALLS)
def test_forward_copies_nothing(name: str) -> None:
    """The same bytes as the native call, but for the log-sum-exp whose infinities change their sign."""
    ours, native = CALLS[name]
    extra = allocated(ours) - allocated(native)
    lse = HEADS * LENGTH * 4
    assert extra <= (3 * lse if name == "lse" else 0), extra


@pytest.mark.parametrize("form", ["separate", "packed"])
def test_backward_copies_nothing(form: str) -> None:
    def step(attend: Callable[..., Tensor], *leaves: Tensor) -> Action:
        leaves_ = [leaf.clone().requires_grad_() for leaf in leaves]
        dout = torch.randn(1, LENGTH, HEADS, DIM)
        return lambda: torch.autograd.grad(attend(*leaves_), leaves_, dout)

    native = allocated(step(flashtile.attention, *SEPARATE))
    if form == "separate":
        assert allocated(step(flashtile.flash_attn_func, *SEPARATE)) <= native
    else:  # one gradient in place of three, written where it belongs
        assert allocated(step(flashtile.flash_attn_qkvpacked_func, PACKED)) <= native


def test_a_copy_is_noticed() -> None:
    """One copy of q would be 512 kB."""
    q, k, v = SEPARATE
    extra = allocated(lambda: flashtile.flash_attn_func(q.clone(), k, v)) - allocated(
        lambda: flashtile.attention(q, k, v)
    )
    assert extra >= q.nbytes


MOST_MICROSECONDS = 15.0


TINY = [torch.randn(1, 1, 1, 8) for _ in range(3)]
TINY_KV = torch.stack(TINY[1:], 2)
TINY_STARTS = torch.tensor([0, 1], dtype=torch.int32)
TINY_CALLS: dict[str, tuple[Action, Action]] = {
    "dense": (
        lambda: flashtile.flash_attn_func(*TINY, 0.0, None, True),
        lambda: flashtile.attention(*TINY, causal=True),
    ),
    "kv": (
        lambda: flashtile.flash_attn_kvpacked_func(TINY[0], TINY_KV, 0.0, None, True, (5, 0)),
        lambda: flashtile.attention(TINY[0], *TINY_KV.unbind(2), causal=True, window=(5, 0)),
    ),
    "varlen": (
        lambda: flashtile.flash_attn_varlen_func(*(t[0] for t in TINY), TINY_STARTS, TINY_STARTS, 1, 1),
        lambda: flashtile.attention_varlen(*(t[0] for t in TINY), TINY_STARTS, TINY_STARTS, 1, 1),
    ),
}


def added(monkeypatch: pytest.MonkeyPatch, wrapped: Action, native: Action) -> float:
    """Microseconds of the host's, see host_time."""
    monkeypatch.setattr(functions, "attend", computes_nothing)
    return added_host_time(monkeypatch, native, wrapped)


@pytest.mark.parametrize("name", TINY_CALLS)
def test_host_time_over_the_native_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert added(monkeypatch, *TINY_CALLS[name]) < MOST_MICROSECONDS


def test_a_slow_wrapper_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow() -> None:
        flashtile.flash_attn_func(*TINY)
        time.sleep(1e-4)

    assert added(monkeypatch, slow, lambda: flashtile.attention(*TINY)) > MOST_MICROSECONDS
