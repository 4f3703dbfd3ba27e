"""transformers' masks as row intervals.

transformers describes a mask as a function of two positions, composed from a few named ones, and lets each attention
implementation make of it what it can use. Most of these functions say of each row one interval of keys: such a mask
becomes a table of O(length) numbers, and tiles outside of it are never computed. What is not of that family becomes the
boolean matrix that PyTorch's attention gets too: quadratic, and exact all the same.

A table has the form (1 or batch, 1, q_len, 2), int32: the first and the end of each row's keys. Four dimensions,
because transformers passes on a mask of four dimensions as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils.import_utils import is_tracing

MaskFunction = Callable[..., Any]
Bounds = tuple[Tensor, Tensor]

_MODULE = causal_mask_function.__module__
_UNLIMITED = 2**40  # beyond any position, and far from int64's end

# The functions that look at a part of the keys only, and what their closures call its size.
_SIZES = {
    "sliding_window_overlay": "sliding_window",
    "sliding_window_bidirectional_overlay": "sliding_window",
    "chunked_overlay": "chunk_size",
}


def attention_mask_for(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """A mask as `attn_implementation="flashtile"` reads it; the signature of transformers' mask functions.

    Returns:
        None where is_causal says it all, a table (see above), or a boolean matrix (batch, 1, q_len, k_len).

    Source: transformers.masking_utils.sdpa_mask, whose arguments these are.
    """

    def matrix(may_skip_causal: bool = False, may_skip_two_sided: bool = False) -> Tensor | None:
        return sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            mask_function,
            attention_mask,
            local_size,
            may_skip_causal,
            may_skip_two_sided,
            use_vmap=use_vmap,
            device=device,
            **kwargs,
        )

    # Where neither may be left away, the model reads the mask itself, as a matrix; packing alone is ours to read.
    causal = allow_is_causal_skip
    two_sided = allow_is_bidirectional_skip and not causal
    if is_tracing(attention_mask):
        # A compiler lets nobody look into a function's closure, nor branch on what a tensor holds.
        return matrix(causal and q_length == kv_length, two_sided)
    parts = _parts(mask_function)
    plain = (causal or two_sided) and not use_vmap and _is_plain(parts, q_length, kv_length, q_offset, kv_offset)
    if plain and attention_mask is None:
        return None
    bounds = None if use_vmap else _bounds(mask_function, _rows(q_length, q_offset, device))
    if bounds is None or not (causal or two_sided or "packed_sequence_mask_function" in parts):
        return matrix()
    padding = None
    if attention_mask is not None:
        everything, padding = _padding(attention_mask, kv_length, kv_offset)
        if everything and plain:
            return None
        if not everything and padding is None:
            return matrix()
    return _table(bounds, padding, kv_length, kv_offset)


def _rows(q_length: int, q_offset: int | Tensor, device: torch.device | str) -> Tensor:
    return (torch.arange(q_length, device=device) + q_offset)[None, :]


def _parts(function: MaskFunction) -> dict[str, MaskFunction]:
    """The functions that a mask is the intersection of, by name."""
    if _name(function) != "and_masks":
        return {_name(function): function}
    return {name: part for inner in _captured(function)["mask_functions"] for name, part in _parts(inner).items()}


def _is_plain(
    parts: dict[str, MaskFunction], q_length: int, kv_length: int, q_offset: int | Tensor, kv_offset: int
) -> bool:
    """Whether the layer's `is_causal` says the whole mask: windows as long as the keys, and rows that stand where it
    means, as many as keys or one that sees them all.

    A static cache has its offset in a tensor; asking for the number would wait for the device.
    """
    if any(name in parts and _captured(parts[name])[size] < kv_length for name, size in _SIZES.items()):
        return False
    others = parts.keys() - _SIZES.keys()
    if others == {"bidirectional_mask_function"}:
        return True
    if others != {"causal_mask_function"} or isinstance(q_offset, Tensor):
        return False
    if q_length == kv_length:
        return q_offset == 0 == kv_offset
    return len(parts) == 1 and q_length == 1 and q_offset + 1 >= kv_offset + kv_length


def _bounds(function: MaskFunction, row: Tensor) -> Bounds | None:
    """(lo, hi) of the keys, by absolute position, that a mask function lets rows see; None for any other function.

    row: int64, (1 or batch, q_len), the rows' positions.
    """
    reader = _READERS.get(_name(function))
    return None if reader is None else reader(row, **_captured(function))


def _name(function: MaskFunction) -> str:
    """What transformers calls a mask function: its own name, or that of the function that made it."""
    if getattr(function, "__module__", None) != _MODULE:
        return ""
    return function.__qualname__.split(".")[0]


def _captured(function: MaskFunction) -> dict[str, Any]:
    """The values that a mask function was made with, by name."""
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _causal(row: Tensor) -> Bounds:
    return torch.zeros_like(row), row + 1


def _everything(row: Tensor) -> Bounds:
    return torch.zeros_like(row), torch.full_like(row, _UNLIMITED)


def _both(row: Tensor, mask_functions: tuple[MaskFunction, ...]) -> Bounds | None:
    lo, hi = _everything(row)
    for function in mask_functions:
        bounds = _bounds(function, row)
        if bounds is None:
            return None
        lo, hi = torch.maximum(lo, bounds[0]), torch.minimum(hi, bounds[1])
    return lo, hi


def _window(row: Tensor, sliding_window: int) -> Bounds:
    return row - sliding_window + 1, torch.full_like(row, _UNLIMITED)


def _two_sided_window(row: Tensor, sliding_window: int) -> Bounds:
    return row - sliding_window, row + sliding_window + 1


def _chunk(row: Tensor, chunk_size: int, left_padding: Tensor) -> Bounds:
    first = left_padding[:, None]
    start = (row - first).div(chunk_size, rounding_mode="floor") * chunk_size + first
    return start, start + chunk_size


def _same_sequence(row: Tensor, packed_sequence_mask: Tensor) -> Bounds:
    """The sequences are numbered in order (transformers counts where positions start anew)."""
    number = packed_sequence_mask.contiguous()
    return torch.searchsorted(number, number), torch.searchsorted(number, number, right=True)


def _by_own_position(row: Tensor, mask_function: MaskFunction, position_ids: Tensor) -> Bounds | None:
    """Within a packed sequence positions go up by one: what holds for them holds, shifted, for the places."""
    bounds = _bounds(mask_function, position_ids)
    shift = row - position_ids
    return None if bounds is None else (bounds[0] + shift, bounds[1] + shift)


_READERS: dict[str, Callable[..., Bounds | None]] = {
    "causal_mask_function": _causal,
    "bidirectional_mask_function": _everything,
    "and_masks": _both,
    "sliding_window_overlay": _window,
    "sliding_window_bidirectional_overlay": _two_sided_window,
    "chunked_overlay": _chunk,
    "packed_sequence_mask_function": _same_sequence,
    "remap_positions_for_packed_sequence": _by_own_position,
}


def _padding(attention_mask: Tensor, kv_length: int, kv_offset: int) -> tuple[bool, Bounds | None]:
    """(whether there is none, the first and the end of the keys that are not padding, each [batch, 1]).

    No bounds where padding lies between keys. The one question to the device that a forward pass asks, as with
    PyTorch's attention.
    """
    missing = kv_offset + kv_length - attention_mask.shape[-1]
    seen = torch.nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask
    seen = seen[:, kv_offset : kv_offset + kv_length].bool()
    count = seen.sum(-1, keepdim=True)
    first = seen.int().argmax(-1, keepdim=True)
    connected = seen.cumsum(-1).gather(-1, (first + count - 1).clamp(min=0)) == count
    everything, tabular = torch.stack([(count == kv_length).all(), connected.all()]).tolist()
    if everything or not tabular:
        return everything, None
    return False, (first + kv_offset, first + count + kv_offset)


def _table(bounds: Bounds, padding: Bounds | None, kv_length: int, kv_offset: int) -> Tensor:
    lo, hi = bounds
    if padding is not None:
        lo, hi = torch.maximum(lo, padding[0]), torch.minimum(hi, padding[1])
    table = torch.stack([lo, hi]).sub_(kv_offset).clamp_(0, kv_length).to(torch.int32)  # [2, 1 or batch, q_len]
    return table.permute(1, 2, 0)[:, None]


def is_table(mask: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[3] == 2


def from_table(mask: Tensor) -> Bounds:
    """(lo, hi), each int32 (1 or batch, q_len), as the native call takes them."""
    return mask[:, 0, :, 0].contiguous(), mask[:, 0, :, 1].contiguous()
