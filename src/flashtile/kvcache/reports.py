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
    sentences: dict[str, str]


ARGUMENTS = (
    "cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table", "rotary_cos", "leftpad_k", "seqused_k",
)  # fmt: skip
_ASYNCHRONOUS = ("cuda", "xpu")
_flags: dict[torch.device, _Flags] = {}


def on_host(device: torch.device) -> bool:
    """Whether contents are at hand; on a GPU, reading a number waits for all that was asked of it before."""
    return device.type not in _ASYNCHRONOUS


def look(findings: list[Finding], device: torch.device) -> None:
    """Raises ValueError for the first wrong value; on a GPU the next call does, or flashtile.check_device_errors."""
    if any(type(finding.bad) is not Tensor for finding in findings) or device.type == "meta":
        return  # while a compiler traces there are no contents
    if not on_host(device):
        _note(findings, device)
        return
    for argument, values, bad, expected in findings:
        if bool(bad.any()):
            values, bad = torch.broadcast_tensors(values, bad)
            fail(argument, values[bad][0].item(), expected)


def _note(findings: list[Finding], device: torch.device) -> None:
    """Adds findings to a device's flags, and starts their way to the host."""
    flags = _of(device)
    bad = {finding.argument: finding.bad.any() for finding in findings}
    none = torch.zeros((), dtype=torch.bool, device=device)
    flags.found.logical_or_(torch.stack([bad.get(argument, none) for argument in ARGUMENTS]))
    flags.seen.copy_(flags.found, non_blocking=True)
    for argument, _, _, expected in findings:
        flags.sentences[argument] = f"{argument}: got a value out of range, expected {expected}"


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
    found = [flags.sentences[name] for name, value in zip(ARGUMENTS, flags.seen.tolist(), strict=True) if value]
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
