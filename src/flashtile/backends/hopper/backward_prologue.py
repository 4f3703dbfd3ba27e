"""Before the backward's main kernel: what it needs of each query row, and zeros to add dQ to. Where dV has a launch of
its own, that makes the zeros, and of long walks delta (backward_errands.py).

    delta = rowsum(dO O) - dlse          lse in base 2, +inf for rows that see nothing or do not exist

With lse = +inf the weights of a row are 0 without a mask. Of float16 calls also, for each block of rows, the length of
the longest row of dO and the largest delta. The gradients of sinks and of a bias that is one per query
row need no more than this, and are made here too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.backends.hopper import backward_configs, dialect, launch
from flashtile.backends.hopper.backward_turns import COUNTERS
from flashtile.backends.hopper.strides import aligned_strides
from flashtile.gpu import arguments
from flashtile.gpu.scores import LOG2E
from flashtile.gpu.sequences import place, scratch_row, sequence
from flashtile.problem import Call, Problem

ROWS = 64  # of a program


@triton.jit(do_not_specialize=arguments.RUNTIME)
def prologue_kernel(
    out, dout, lse, dlse, rows, accumulated, counters, dbias, dsinks, bias,
    slopes, sinks, cu_q, cu_k, lo, hi, rng, mailbox,
    stride_ob, stride_om, stride_oh, stride_od, stride_yb, stride_ym, stride_yh, stride_yd, batch, heads, max_q,
    total_q, padded, scratch, tiles, programs, section, keep_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DIM_V: tl.constexpr, DV: tl.constexpr, VARLEN: tl.constexpr,
    SINKS: tl.constexpr, DLSE: tl.constexpr, DBIAS: tl.constexpr, BLOCKS: tl.constexpr, CLEARS: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGN: tl.constexpr, PRODUCTS: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    stride_ob, stride_om, stride_oh = stride_ob * ALIGN, stride_om * ALIGN, stride_oh * ALIGN
    stride_yb, stride_ym, stride_yh = stride_yb * ALIGN, stride_ym * ALIGN, stride_yh * ALIGN
    tile, bh = place(tl.program_id(0), tiles, programs, section)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    q_start, q_len = sequence(cu_q, b, max_q, total_q, 0, mailbox, VARLEN, False)
    first_row = tile * ROWS
    if tl.program_id(0) == 0:
        for i in tl.static_range(COUNTERS):
            tl.store(counters + i, 0)
    if SINKS:
        tl.store(dsinks + bh * tiles + tile, 0.0)
    if first_row >= (q_len + 127) // 128 * 128:
        return
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, DV)
    inside = row < q_len
    both = inside[:, None] & (column < DIM_V)[None, :]
    at = (q_start + row).to(tl.int64)[:, None]
    per_row = (h * total_q + q_start if VARLEN else (b * heads + h) * max_q) + row
    product = tl.zeros([ROWS], tl.float32)
    if DELTA:
        o = tl.load(out + b * stride_ob + h * stride_oh + at * stride_om + column[None, :] * stride_od, both, 0.0)
        do = tl.load(dout + b * stride_yb + h * stride_yh + at * stride_ym + column[None, :] * stride_yd, both, 0.0)
        product = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    delta = product
    if DLSE:
        delta -= tl.load(dlse + per_row, mask=inside, other=0.0)
    lse_row = tl.load(lse + per_row, mask=inside, other=float("inf")) * LOG2E
    lse_row = tl.where(lse_row == -float("inf"), float("inf"), lse_row)
    scratch_at = scratch_row(b, h, heads, q_start, padded, VARLEN) + first_row
    tl.store(rows + scratch_at + tl.arange(0, ROWS), lse_row)
    kept_delta = delta
    if DROPOUT:
        # What is kept is scaled once, at the end, and so is all of dS.
        kept_delta = delta / keep_scale
    if DELTA:
        tl.store(rows + scratch + scratch_at + tl.arange(0, ROWS), kept_delta)
    if PRODUCTS == "bounded":
        longest = tl.sqrt(tl.max(tl.sum(do.to(tl.float32) * do.to(tl.float32), 1), 0))
        tl.store(rows + 2 * scratch + scratch_at // ROWS, longest)
        tl.store(rows + 2 * scratch + (scratch + scratch_at) // ROWS, tl.max(tl.abs(kept_delta), 0))
    if BLOCKS:
        tl.store(counters + COUNTERS + scratch_at // ROWS, 0)
    weight = tl.zeros([ROWS], tl.float32)
    if SINKS:
        weight = tl.exp2(tl.load(sinks + h).to(tl.float32) * LOG2E - lse_row)
        tl.store(dsinks + bh * tiles + tile, -tl.sum(weight * delta, 0))
    if DBIAS == "row":
        # The sum of dS = P (dP - delta) over all keys: P sums to 1 less the sink's share, P dP to dO O.
        total = tl.where(lse_row == float("inf"), 0.0, product - delta * (1.0 - weight))
        tl.store(dbias + (b * heads + h) * max_q + row, total, mask=inside)
    if CLEARS:
        WIDTH: tl.constexpr = COLUMNS & -COLUMNS  # tensors are as large as a power of two
        zeros = tl.zeros([ROWS * WIDTH], tl.float32)
        for first in tl.static_range(0, ROWS * COLUMNS, ROWS * WIDTH):
            tl.store(accumulated + scratch_at.to(tl.int64) * COLUMNS + first + tl.arange(0, ROWS * WIDTH), zeros)


def run(
    launches: launch.Launches, problem: Problem, call: Call, tensors: tuple[Tensor, ...], variant: tuple[Any, ...]
) -> None:
    """tensors: out, dout, lse, dlse, rows, dq's accumulator, counters, dbias, dsinks, stand-ins for absent ones."""
    launches.run(prologue_kernel, (), tensors, lambda: prepare(problem, call, variant, tensors))


def tiles(problem: Problem) -> int:
    """Programs for the rows of one head."""
    return 128 // ROWS * max(1, triton.cdiv(problem.q_len, 128))


def products(problem: Problem) -> str:
    """How P (dP - delta) is made: "narrow", of 16-bit values, which in bfloat16 have the range of float32; "wide", of
    float32 values; "bounded", narrow where a bound on dP allows it.

    The last takes both into the kernel, and with dropout that costs registers: 4 % slower at head dim 64, 3 % faster at
    128, unless ptxas 13 compiles it, which then makes all products one by one.
    """
    if problem.dtype == torch.bfloat16:
        return "narrow"
    crowded = max(problem.qk_dim, problem.v_dim) <= 64 or dialect.PTXAS_13.value
    return "wide" if problem.dropout_p > 0 and crowded else "bounded"


def prepare(problem: Problem, call: Call, variant: tuple[Any, ...], tensors: tuple[Tensor, ...]) -> launch.Plan:
    """The launch of a problem; variant: the kind of dbias, whether there is a dlse, and whether delta is made here."""
    out, dout = tensors[:2]
    kind, dlse, delta = variant
    programs = problem.batch * problem.q_heads
    _, v_dim = backward_configs.widths(problem)
    strides, align = aligned_strides(problem, {"o": out, "y": dout})
    values = {
        **arguments.scalars(problem, call),
        **strides,
        "ALIGN": align,
        "tiles": tiles(problem),
        "programs": programs,
        "section": 1,
        "ROWS": ROWS,
        "PRODUCTS": products(problem),
        "COLUMNS": backward_configs.accumulator_columns(problem),
        "DIM_V": problem.v_dim,
        "DV": v_dim,
        "VARLEN": problem.varlen,
        "SINKS": problem.sinks,
        "DLSE": dlse,
        "DELTA": delta,
        "DBIAS": kind,
        "BLOCKS": backward_configs.counts_blocks(problem),
        "CLEARS": backward_configs.cleared_by(problem) == "prologue",
        "DROPOUT": problem.dropout_p > 0,
    }
    return launch.Plan(tiles(problem) * programs, values, {"num_warps": 4, "enable_fp_fusion": True}, lambda boxed: ())
