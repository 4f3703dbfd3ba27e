"""Tensor descriptors: how tiles of rows come from and go to (batch, seqlen, heads, head_dim) tensors by TMA.

Rows past a sequence's end and columns past the head dim read as 0 and are never written. For packed sequences that
needs a trick (triton.tools.ragged_tma has it too): two more dimensions whose strides cancel modulo 2**64, so that the
coordinate that counts rows can be made to leave its bounds exactly where a sequence ends.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends.hopper.dialect import load, reinterpret, store

__all__ = ["aligned", "aligned_like", "fits", "load_rows", "rows", "steps", "store_rows", "swizzled", "writable"]

_BYTES = 16  # what TMA wants addresses and strides to be multiples of
_ENDLESS = 0x7FFF0000
RAGGED = gl.constexpr(2**30)


def rows(tensor: Tensor, ROWS: int, DIM: int, varlen: bool) -> TensorDescriptor:
    """Boxes of ROWS rows of one head, DIM columns wide; tensor is one that `aligned` returned."""
    box = [1, ROWS, 1, DIM]
    shape, strides = list(tensor.shape), steps(tensor)
    if varlen:
        step = strides[0]
        box = [1, *box]
        shape = [_ENDLESS, _ENDLESS, RAGGED.value, *shape[1:]]
        strides = [2**34 - step, step, *strides]
    return TensorDescriptor(tensor, shape, strides, box, swizzled(tensor.element_size(), DIM, len(box)))


def steps(tensor: Tensor) -> list[int]:
    """Strides as TMA accepts them: those of axes of length 1, which nobody steps along, are replaced."""
    elements = _BYTES // tensor.element_size()
    outer = zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
    return [stride if length > 1 else elements for length, stride in outer] + [1]


@gluon.constexpr_function
def swizzled(itemsize, columns, rank=2):
    """The layout of such a box in shared memory."""
    width = min(128, columns * itemsize)
    return gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * itemsize, rank=rank)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself where TMA can address it, else a copy that it can: rows padded to 16 bytes."""
    return tensor if fits(tensor) else aligned_like(tensor).copy_(tensor)


def aligned_like(tensor: Tensor) -> Tensor:
    """Uninitialised memory of the tensor's shape that TMA can address."""
    elements = _BYTES // tensor.element_size()
    dim = tensor.shape[-1]
    padded = -(-dim // elements) * elements
    return torch.empty((*tensor.shape[:-1], padded), dtype=tensor.dtype, device=tensor.device)[..., :dim]


def writable(tensor: Tensor) -> Tensor:
    """The tensor itself where TMA can address it, else uninitialised memory in its place."""
    return tensor if fits(tensor) else aligned_like(tensor)


def fits(tensor: Tensor) -> bool:
    """True where TMA can address the tensor."""
    return tensor.data_ptr() % _BYTES == 0 and _steps_fit(tensor.shape, tensor.stride(), tensor.element_size())


@lru_cache(maxsize=4096)  # asked for the bias of every call
def _steps_fit(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    if strides[-1] != 1 and shape[-1] > 1:
        return False
    elements = _BYTES // itemsize
    return all(n == 1 or (s > 0 and s % elements == 0) for n, s in zip(shape[:-1], strides[:-1], strict=True))


@gluon.jit
def load_rows(desc, full, tile, b, h, start, length, row, VARLEN: gl.constexpr, COLUMN: gl.constexpr = 0):
    """Starts the copy of a box, from column COLUMN on, into tile [ROWS, DIM]; its bytes arrive at `full`."""
    box = reinterpret(tile, desc.dtype, desc.block_type.shape, desc.layout)
    if VARLEN:
        load(desc, [RAGGED, start + length, RAGGED - length + row, h, COLUMN], full, box)
    else:
        load(desc, [b, row, h, COLUMN], full, box)


@gluon.jit
def store_rows(desc, tile, b, h, start, length, row, VARLEN: gl.constexpr, COLUMN: gl.constexpr = 0):
    """Starts the copy of tile [ROWS, DIM] to its box, from column COLUMN on; tma.store_wait waits until it was read."""
    box = reinterpret(tile, desc.dtype, desc.block_type.shape, desc.layout)
    if VARLEN:
        store(desc, [RAGGED, start + length, RAGGED - length + row, h, COLUMN], box)
    else:
        store(desc, [b, row, h, COLUMN], box)


@gluon.jit
def await_writes(number):
    """Until what the caller's threads have stored by TMA lies in memory, not only has been read; number: any."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0; mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1
    )
