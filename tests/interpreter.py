"""Makes Triton's interpreter compute as a GPU does, where it does not by itself (3.6.0 to 3.9.0).

It cuts off the low bits when it casts to bfloat16, where GPUs round to nearest even: a probability of 0.9999999 would
become 0.996, and errors would be one-sided; a test of bfloat16 would measure the interpreter. And NumPy, which it
computes with, warns where a GPU answers -inf to log2(0).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def compute_as_a_gpu_does() -> None:
    """Replaces the interpreter's cast and silences NumPy for the rest of the process; a second call does nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    np.seterr(all="ignore")
    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl
    if hasattr(cast, "rounds_to_nearest"):
        return

    def cast_impl(self: Any, source: Any, dst_type: Any) -> Any:
        if (source.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dst_type)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), dst_type.scalar)

    cast_impl.rounds_to_nearest = True
    builder.cast_impl = cast_impl
