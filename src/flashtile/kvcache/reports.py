"""Contents that are out of range, found without a wait: a GPU says so in pinned memory, and the next call raises.

Each device keeps one flag for each argument; a call adds its findings to the flags and starts their copy to the host.
On a CPU contents are looked at before the call.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.validation import fail


class Finding(NamedTuple):
    """Which values of an argument are wrong, and what is expected of them; `bad` and `values` broadcast together."""

    argument: str
    values: Tensor
    bad: Tensor
    expected: str


class _Flags(NamedTuple):
    found: Tensor  # int32 (arguments,), on the device
    seen: Tensor  # the same in pinned memory, as far as the device has come
    sentences: dict[int, str]


ARGUMENTS = (
    "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table", "rotary_cos", "leftpad_k", "seqused_k",
)  # fmt: skip
_ASYNCHRONOUS = ("cuda", "xpu")
_flags: dict[torch.device, _Flags] = {}


def look(findings: list[Finding], device: torch.device) -> None:
    """Raises ValueError for the first wrong value; on a GPU the next call does, or flashtile.check_device_errors."""
    if device.type in _ASYNCHRONOUS:
        _note(findings, device)
        return
    for argument, values, bad, expected in findings:
        if bool(bad.any()):
            values, bad = torch.broadcast_tensors(values, bad)
            fail(argument, values[bad][0].item(), expected)


def _note(findings: list[Finding], device: torch.device) -> None:
    flags = _of(device)
    for argument, _, bad, expected in findings:
        slot = ARGUMENTS.index(argument)
        flags.found[slot].logical_or_(bad.any())
        flags.sentences[slot] = f"{argument}: got a value out of range, expected {expected}"
    flags.seen.copy_(flags.found, non_blocking=True)


def _of(device: torch.device) -> _Flags:
    flags = _flags.get(device)
    if flags is None:
        found = torch.zeros(len(ARGUMENTS), dtype=torch.int32, device=device)
        seen = torch.zeros(len(ARGUMENTS), dtype=torch.int32, pin_memory=device.type in _ASYNCHRONOUS)
        flags = _flags[device] = _Flags(found, seen, {})
    return flags


def raise_if_set(device: torch.device) -> None:
    """Raises what earlier calls on this device found, once."""
    flags = _flags.get(device)
    if flags is None or not bool(flags.seen.any()):
        return
    found = [flags.sentences[slot] for slot, value in enumerate(flags.seen.tolist()) if value]
    flags.seen.zero_()
    flags.found.zero_()
    raise ValueError(f"an earlier flashtile call on this device had bad arguments: {'; '.join(found)}")


def check(device: torch.device | None) -> None:
    """Waits for a device, or for all that have flags, and raises what calls on them found."""
    for place in [*_flags]:
        if device is not None and (place.type != device.type or device.index not in (None, place.index)):
            continue
        if place.type in _ASYNCHRONOUS:
            torch.accelerator.synchronize(place)
        raise_if_set(place)
