"""Makes Triton's interpreter round to bfloat16 as GPUs do, to nearest even; it cuts the low bits off (3.6.0 to 3.9.0).

A probability of 0.9999999 would become 0.996, and errors would be one-sided: a test of bfloat16 would measure the
interpreter. `test_backends` checks the repair.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def round_bfloat16_to_nearest() -> None:
    """Replaces the interpreter's cast for the rest of the process; a second call does nothing."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast = builder.cast_impl
    if hasattr(cast, "rounds_to_nearest"):
        return

    def cast_impl(self: Any, source: Any, dst_type: Any) -> Any:
        if (source.dtype.scalar, dst_type.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, dst_type)
        rounded = torch.from_numpy(np.array(source.data)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), dst_type.scalar)

    cast_impl.rounds_to_nearest = True  # type: ignore[attr-defined]
    builder.cast_impl = cast_impl
