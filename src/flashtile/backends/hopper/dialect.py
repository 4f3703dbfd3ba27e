"""Everything of Gluon that differs between Triton 3.6 and 3.9, or has no public name there."""

import linecache
from typing import Any

import triton
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.core import _aggregate

__all__ = [
    "PTXAS_13",
    "aggregate",
    "barrier",
    "encode_descriptor",
    "load",
    "reduce_add",
    "reinterpret",
    "store",
]

# Triton 3.9 compiles for Hopper with ptxas 13, too, which needs more registers.
PTXAS_13 = gl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8))

# Renamed after 3.6: a barrier of all threads of one partition.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# Renamed after 3.7: (descriptor, coordinates, mbarrier, shared memory) and (descriptor, coordinates, shared memory).
load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


def aggregate(cls: Any) -> Any:
    """A device value of several named ones, made from them in the order of the annotations; 3.9 does that by itself.

    Triton compiles constructors from their source, so this one has a source: it stands in Python's cache of lines.
    """
    if "__init__" not in vars(cls):
        wrapped = {name: f"gl.constexpr({name})" for name, kind in cls.__annotations__.items() if kind is gl.constexpr}
        lines = [f"def __init__(self, {', '.join(cls.__annotations__)}):\n"]
        lines += [f"    self.{name} = {wrapped.get(name, name)}\n" for name in cls.__annotations__]
        place = f"<constructor of {cls.__module__}.{cls.__qualname__}>"
        linecache.cache[place] = (sum(map(len, lines)), None, lines, place)
        scope = {"gl": gl, "__name__": cls.__module__}
        exec(compile("".join(lines), place, "exec"), scope)  # noqa: S102 (text of the lines above)
        cls.__init__ = gluon.constexpr_function(scope["__init__"])
    return _aggregate(cls)


@builtin
def reinterpret(memory, dtype, shape, layout, _semantic=None):
    """The same shared memory as another tile. A method from 3.8 on, a private one before."""
    dtype, shape, layout = (_unwrap_if_constexpr(value) for value in (dtype, shape, layout))
    return _semantic.memdesc_reinterpret(memory, dtype, [_unwrap_if_constexpr(size) for size in shape], layout)


@builtin
def reduce_add(tensor_desc, coord, src, _semantic=None):
    """Adds shared memory to global memory; `tma.store_wait` waits for it. Public as async_atomic_add from 3.7 on."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


def encode_descriptor(descriptor: Any, metadata: dict[str, Any]) -> Any:
    """The tensor map of a host-side TensorDescriptor, as the kernel's metadata describes its box."""
    utils = triton.runtime.driver.active.utils
    # Renamed after 3.6.
    fill = utils.fill_tma_descriptor_tiled if hasattr(utils, "fill_tma_descriptor_tiled") else utils.fill_tma_descriptor
    elem_type = {8: 10, 9: 8, 10: 9}.get(metadata["elem_type"], metadata["elem_type"])  # device to host numbering
    return fill(
        descriptor.base.data_ptr(),
        metadata["swizzle"],
        metadata["elem_size"],
        elem_type,
        metadata["block_size"],
        descriptor.shape,
        descriptor.strides,
        0,
    )
