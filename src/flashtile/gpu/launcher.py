"""Starting a kernel that Triton has compiled without the Python around its launch, as Triton 3.6 to 3.9 have it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from typing import Any


def bare_launcher(compiled: Any, programs: int) -> Callable[[int, tuple[Any, ...]], None]:
    """A function (stream, arguments) that starts a CompiledKernel, with ready tensor maps, (map, *shape, *strides),
    for each descriptor.

    Triton's own encodes every descriptor anew on every launch, 7 us each. On NVIDIA's devices its function in C is
    called without the method around it, 3 us, which provides scratch memory for those few kernels that ask for it.
    """
    method = compiled.run
    grid, function, metadata = (programs, 1, 1), compiled.function, (compiled.packed_metadata, None, None, None)
    if not hasattr(method, "launch_pdl"):  # what only NVIDIA's has; builds for other devices may lack its class
        return lambda stream, arguments: method(*grid, stream, function, *metadata, *arguments)
    method = copy(method)
    wrapped = inspect.getclosurevars(method.launch).nonlocals if inspect.isfunction(method.launch) else {}
    launch = method.launch = wrapped.get("launcher", method.launch)
    if method.global_scratch_size or method.profile_scratch_size or getattr(method, "gsan_enabled", False):
        return lambda stream, arguments: method(*grid, stream, function, *metadata, *arguments)
    options, no_scratch = (method.launch_cooperative_grid, method.launch_pdl), (None, None)
    if hasattr(method, "arg_annotations"):  # from 3.7 on
        newer = (function, *options, *metadata, *no_scratch, method.arg_annotations, method.kernel_signature)
        return lambda stream, arguments: launch(programs, 1, 1, stream, *newer, arguments)
    older = (function, *options, *no_scratch, *metadata)
    return lambda stream, arguments: launch(programs, 1, 1, stream, *older, *arguments)
