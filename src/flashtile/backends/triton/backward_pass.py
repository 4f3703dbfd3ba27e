"""Backward by recomputation (FlashAttention-2, section 3.2), in two passes that need no atomics and repeat bitwise.

First over query tiles for dQ (query_pass), then over key tiles for dK and dV (key_pass). Both recompute the scores:
seven products in all instead of five; in return no float32 copy of dQ exists and nothing depends on the order in which
programs finish.
"""

import torch
from torch import Tensor

from flashtile.backends.triton import bias_gradient, key_pass, launch, query_pass
from flashtile.gpu import arguments
from flashtile.gpu.bias_gradient import allocate
from flashtile.gpu.bias_gradient import kind as kind_of
from flashtile.masks import rows_seeing
from flashtile.problem import Call, Problem


def backward(
    problem: Problem,
    call: Call,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    grads: tuple[Tensor, Tensor, Tensor],
    bias_grad: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Writes dq, dk, dv and returns (dbias, dsinks)."""
    q, k, v = call.q, call.k, call.v
    assert k is not None and v is not None
    dq, dk, dv = grads
    if dout.stride(-1) != 1:
        dout = dout.contiguous()  # a broadcast gradient, such as that of out.sum(), has no rows to load
    kind = kind_of(problem) if bias_grad else "none"
    partial = allocate(problem, call, kind)
    dbias_or_q = q if partial is None else partial
    rows = torch.empty(2, arguments.scratch_rows(problem), dtype=torch.float32, device=q.device)
    sink_sums = _sink_sums(problem, q) if problem.sinks else rows
    dlse_or_lse = lse if dlse is None else dlse.contiguous()

    tensors: tuple[Tensor, ...] = (q, k, v, out, dout, lse, dlse_or_lse, rows, dq, dbias_or_q, sink_sums)
    launch.run(query_pass.queries_kernel, problem, call, tensors, query_pass.prepare, (kind, dlse is not None))

    first_rows, end_rows = (
        (q, q) if call.lo is None or call.hi is None else rows_seeing(call.lo, call.hi, problem.k_len)
    )
    tensors = (q, k, v, dout, rows, dk, dv, dbias_or_q, first_rows, end_rows)
    launch.run(key_pass.keys_kernel, problem, call, tensors, key_pass.prepare, (kind,))

    dbias = None if partial is None else bias_gradient.finish(problem, call, kind, partial, dout, rows)
    dsinks = None if call.sinks is None else sink_sums.sum((0, 2)).to(call.sinks.dtype)
    return dbias, dsinks


def _sink_sums(problem: Problem, q: Tensor) -> Tensor:
    """One partial gradient of the sink per batch, head and query tile; tiles without rows leave 0."""
    shape = (problem.batch, problem.q_heads, query_pass.tiles(problem))
    return torch.zeros(shape, dtype=torch.float32, device=q.device)
