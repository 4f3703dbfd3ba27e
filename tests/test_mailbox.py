"""What kernels report of cu_seqlens' contents reaches the next call on that device, once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile.gpu import mailbox
from flashtile.problem import Call
from flashtile.validation import describe

CPU = torch.device("cpu")


@pytest.fixture
def slots() -> Iterator[Tensor]:
    slots = mailbox.of(CPU)
    slots.zero_()
    yield slots
    slots.zero_()


def test_slots_are_made_once(slots: Tensor) -> None:
    assert mailbox.of(CPU).data_ptr() == slots.data_ptr()
    assert (slots.dtype, tuple(slots.shape)) == (torch.int32, (4,))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, ["cu_seqlens_q: got values that do not start at 0 or that decrease, expected"]),
        (1, ["cu_seqlens_q: got an end beyond q or a sequence longer than max_seqlen_q, expected"]),
        (2, ["cu_seqlens_k: got values that do not start at 0 or that decrease, expected"]),
        (3, ["cu_seqlens_k: got an end beyond k or a sequence longer than max_seqlen_k, expected"]),
    ],
)
def test_a_report_is_raised_once(slots: Tensor, code: int, words: list[str]) -> None:
    mailbox.raise_if_set(None)
    slots[code] = 1
    with pytest.raises(ValueError, match="an earlier flashtile call on this device") as caught:
        mailbox.raise_if_set(None)
    assert all(word in str(caught.value) for word in words)
    assert str(caught.value).count("got") == 1
    assert not bool(slots.any())
    mailbox.raise_if_set(None)


def test_several_reports_are_raised_together(slots: Tensor) -> None:
    slots[0] = slots[3] = 1
    with pytest.raises(ValueError, match=r"cu_seqlens_q: got values that do not.*; cu_seqlens_k: got an end beyond k"):
        flashtile.check_device_errors()
    flashtile.check_device_errors("cpu")


def test_the_next_call_of_the_backend_raises(slots: Tensor) -> None:
    pytest.importorskip("triton")
    q = torch.zeros(1, 2, 1, 16, device="cuda" if torch.cuda.is_available() else "cpu")
    mailbox.of(q.device)[2] = 1
    with pytest.raises(ValueError, match="cu_seqlens_k"):
        flashtile.attention(q, q, q, backend="triton")
    flashtile.attention(q, q, q, backend="triton")


def test_a_device_without_slots_is_clear() -> None:
    mailbox.raise_if_set(63)
    flashtile.check_device_errors("cuda:63")
    flashtile.check_device_errors("cuda")


GOOD = {"cu_seqlens_q": [0, 3, 8], "cu_seqlens_k": [0, 4, 9], "max_seqlen_q": 5, "max_seqlen_k": 5}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"cu_seqlens_q": [1, 3, 8]}, "cu_seqlens_q: got values that do not start at 0"),
    ({"cu_seqlens_q": [0, 4, 3]}, "cu_seqlens_q: got values that do not start at 0 or that decrease"),
    ({"cu_seqlens_q": [0, 3, 9]}, "cu_seqlens_q: got an end beyond q"),
    ({"max_seqlen_q": 4}, "cu_seqlens_q: got an end beyond q or a sequence longer"),
    ({"cu_seqlens_k": [-1, 4, 9]}, "cu_seqlens_k: got values that do not start at 0"),
    ({"cu_seqlens_k": [0, 9, 4]}, "cu_seqlens_k: got values"),
    ({"cu_seqlens_k": [0, 4, 2**30]}, "cu_seqlens_k: got an end beyond k"),
    ({"max_seqlen_k": 4}, "cu_seqlens_k: got an end beyond k or a sequence longer"),
]


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # NumPy's, of the logarithm of a row without keys
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize(("changes", "words"), BAD, ids=lambda value: str(value)[:40])
def test_the_kernel_itself_reports(slots: Tensor, changes: dict[str, Any], words: str) -> None:
    # In Triton's interpreter, past the host's own check of CPU tensors.
    triton = pytest.importorskip("flashtile.backends.triton.forward_pass")
    numbers = {**GOOD, **changes}
    starts = [torch.tensor(numbers[name], dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")]
    q, k = torch.randn(8, 1, 16), torch.randn(9, 1, 16)
    call = Call(q, k, k, None, None, None, *starts, max_seqlen_q=numbers["max_seqlen_q"])
    call = call._replace(max_seqlen_k=numbers["max_seqlen_k"], scale=0.25)
    triton.forward(describe(call), call)
    with pytest.raises(ValueError, match=words):
        mailbox.raise_if_set(None)


def packed_call(changes: dict[str, Any]) -> Callable[[], Tensor]:
    """A call with its tensors already on the GPU, so that nothing but attention happens when it is called."""
    arguments = {
        name: torch.tensor(value, dtype=torch.int32, device="cuda") if isinstance(value, list) else value
        for name, value in {**GOOD, **changes}.items()
    }
    q, k = (torch.randn(rows, 2, 64, device="cuda", dtype=torch.float16) for rows in (8, 9))
    return lambda: flashtile.attention_varlen(q, k, k, **arguments, backend="triton")


@contextmanager
def waiting_forbidden() -> Iterator[None]:
    """PyTorch raises where the host waits for the GPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("changes", "words"), BAD, ids=lambda value: str(value)[:40])
def test_a_kernel_reports_bad_contents_without_a_synchronisation(changes: dict[str, Any], words: str) -> None:
    good, bad = packed_call({}), packed_call(changes)
    good()
    flashtile.check_device_errors()
    with waiting_forbidden():
        bad()
    with pytest.raises(ValueError, match=words):
        flashtile.check_device_errors("cuda")
    bad()
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match=words):
        good()
    good()
    flashtile.check_device_errors()


@pytest.mark.gpu
def test_a_synchronisation_would_be_seen() -> None:
    one = torch.ones(1, device="cuda")
    with waiting_forbidden(), pytest.raises(RuntimeError, match="synchroniz"):
        one.item()
