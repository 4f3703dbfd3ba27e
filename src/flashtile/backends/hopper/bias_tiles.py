"""An additive bias by TMA: which ones it can address, their descriptors, and how tiles come and go.

A tile has a row for each of its queries, with a 16-bit value for each of its keys. What TMA cannot address, and a bias
that is one value per row or per key, goes by pointers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends.hopper import descriptors
from flashtile.backends.hopper.descriptors import swizzled
from flashtile.backends.hopper.dialect import barrier, load, reduce_add, reinterpret, store
from flashtile.problem import Call, Problem

__all__ = ["add_tile", "addressable", "axis", "boxes", "load_tile", "matrices", "store_tile"]


def matrices(problem: Problem, call: Call) -> Tensor | None:
    """The bias as (batch, heads, q_len, k_len), 1 where batches or heads share it; None where TMA cannot load it."""
    bias = call.bias
    if bias is None or bias.dtype not in (torch.float16, torch.bfloat16):
        return None
    return addressable(bias, problem)


def addressable(tensor: Tensor, problem: Problem) -> Tensor | None:
    """The same of a bias or its gradient, of any dtype."""
    if tensor.ndim < 2 or tensor.shape[-2:] != (problem.q_len, problem.k_len) or tensor.stride(-2) == 0:
        return None
    tensor = tensor[(None,) * (4 - tensor.ndim)]
    for shared in (0, 1):
        if tensor.stride(shared) == 0:
            tensor = tensor.narrow(shared, 0, 1)
    return tensor if descriptors.fits(tensor) else None


def boxes(tensor: Tensor, ROWS: int, COLUMNS: int) -> TensorDescriptor:
    """Boxes of one head's rows and columns; tensor is one that `matrices` returned."""
    box = [1, 1, ROWS, COLUMNS]
    layout = descriptors.swizzled(tensor.element_size(), COLUMNS, 4)
    return TensorDescriptor(tensor, list(tensor.shape), descriptors.steps(tensor), box, layout)


@gluon.jit
def axis(index, stride):
    """Where `index` lies along an axis that has the length 1, and the stride 0, where it is shared."""
    return gl.where(stride == 0, 0, index)


@gluon.jit
def load_tile(desc, full, tile, b, h, row, key):
    """Starts the copy of a box into tile [ROWS, COLUMNS]; its bytes arrive at the barrier `full`. What lies past the
    end reads as 0.
    """
    load(desc, [b, h, row, key], full, reinterpret(tile, desc.dtype, desc.block_type.shape, desc.layout))


@gluon.jit
def store_tile(desc, at, tile):
    """Starts the copy of tile [ROWS, COLUMNS] to the box at the coordinates `at`."""
    store(desc, at, reinterpret(tile, desc.dtype, desc.block_type.shape, desc.layout))


@gluon.jit
def add_tile(desc, at, tile, slot):
    """Starts adding a 16-bit tile to the box at the coordinates `at`, as float32, through `slot`.

    It waits until whatever the warp group has sent off has been read, `slot` too.
    """
    ROWS: gl.constexpr = tile.shape[0]
    COLUMNS: gl.constexpr = tile.shape[1]
    wide = tile.load(gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])).to(gl.float32)
    tma.store_wait(0)
    barrier()
    reinterpret(slot, gl.float32, [ROWS, COLUMNS], swizzled(4, COLUMNS)).store(wide)
    fence_async_shared()
    barrier()
    reduce_add(desc, at, reinterpret(slot, gl.float32, desc.block_type.shape, desc.layout))
