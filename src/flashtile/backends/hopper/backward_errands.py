"""The role that launches for dV have besides: errands for the one for dK and dQ.

Under their products, memory has little to do. A launch before that one makes delta (backward_delta.py) and clears dQ's
accumulator (backward_clear.py), one after it makes dQ from the accumulator (backward_convert.py). Nobody in the launch
itself waits for them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma


@gluon.jit
def run_errands(deltas, clearing, conversion):
    """The program's share of each. For four warps, as what it calls."""
    clearing.begin()
    portions = gl.maximum(gl.maximum(deltas.portions(), clearing.portions()), conversion.portions())
    for portion in range(gl.program_id(0), portions, gl.num_programs(0)):
        deltas.run(portion)
        clearing.run(portion)
        conversion.run(portion)
    tma.store_wait(0)
