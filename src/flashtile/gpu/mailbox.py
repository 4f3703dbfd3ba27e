"""What a kernel has to say about the contents of cu_seqlens, without a host synchronisation.

Each device has four int32 slots in pinned host memory, which the device writes and the host reads directly. A kernel
that meets bad contents stores 1 in a slot (and stays within bounds); the next call on that device raises. On a CPU,
in Triton's interpreter, the slots are ordinary memory.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

REPORTS = (
    "cu_seqlens_q: got values that do not start at 0 or that decrease, expected a start at 0 and non-decreasing values",
    "cu_seqlens_q: got an end beyond q or a sequence longer than max_seqlen_q, expected ends within q and max_seqlen_q",
    "cu_seqlens_k: got values that do not start at 0 or that decrease, expected a start at 0 and non-decreasing values",
    "cu_seqlens_k: got an end beyond k or a sequence longer than max_seqlen_k, expected ends within k and max_seqlen_k",
)


class _Mailbox(NamedTuple):
    slots: Tensor  # int32 [4], what kernels write
    halves: Any  # the same 16 bytes as two int64, which the host reads in a few dozen nanoseconds


_mailboxes: dict[int | None, _Mailbox] = {}


def of(device: torch.device) -> Tensor:
    """The slots of a device, int32 (4,), to be passed to its kernels; made on first use, outside any graph capture."""
    mailbox = _mailboxes.get(device.index)
    if mailbox is None:
        slots = torch.zeros(len(REPORTS), dtype=torch.int32, pin_memory=device.type not in ("cpu", "meta"))
        halves = (ctypes.c_int64 * 2).from_address(slots.data_ptr())
        mailbox = _mailboxes[device.index] = _Mailbox(slots, halves)
    return mailbox.slots


def raise_if_set(device_index: int | None) -> None:
    """Raises the ValueError that an earlier kernel on this device reported, once. None stands for the CPU."""
    mailbox = _mailboxes.get(device_index)
    if mailbox is not None and (mailbox.halves[0] or mailbox.halves[1]):
        _raise(mailbox)


def _raise(mailbox: _Mailbox) -> NoReturn:
    found = [report for report, value in zip(REPORTS, mailbox.slots.tolist(), strict=True) if value]
    mailbox.halves[:] = (0, 0)
    raise ValueError(f"an earlier flashtile call on this device had bad arguments: {'; '.join(found)}")


def check(device: torch.device | None) -> None:
    """Waits for a device, or for all that have slots, and raises what their kernels reported."""
    for index in [*_mailboxes] if device is None else _indices(device):
        if index is not None and index in _mailboxes:
            torch.accelerator.synchronize(index)
        raise_if_set(index)


def _indices(device: torch.device) -> list[int | None]:
    if device.type == "cpu" or device.index is not None:
        return [device.index]
    return [torch.accelerator.current_device_index()] if torch.accelerator.is_available() else []
