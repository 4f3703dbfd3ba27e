"""Before the backward's main kernel: what it needs of each query row, zeros to add to, and gradients that are 0.

    delta = rowsum(dO O) - dlse          lse in base 2, +inf for rows that see nothing or do not exist

With lse = +inf the weights of a row are 0 without a mask. The gradients of sinks and of a bias that is one per query
row need no more than this, and are made here too. So are the gradients of packed rows that belong to no sequence, and
dQ of sequences without keys, which no tile of keys ever meets.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flashtile.backends.hopper import descriptors, launch
from flashtile.backends.hopper.strides import aligned_strides
from flashtile.gpu import arguments
from flashtile.gpu.scores import LOG2E
from flashtile.gpu.sequences import past_end, place, scratch_row, sequence
from flashtile.problem import Call, Problem

ROWS = 64  # of a program


@triton.jit
def _blank(
    target, start, total, tile, tiles, stride_m, stride_h, stride_d, heads, DIM: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Zeros for all heads of the lines from start to total; the tiles of one item share them."""
    column = tl.arange(0, D).to(tl.int64)[None, :]
    for first in tl.range(start + tile * ROWS, total, tiles * ROWS):
        line = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        for h in tl.range(0, heads):
            pointers = target + line * stride_m + h.to(tl.int64) * stride_h + column * stride_d
            zeros = tl.zeros([ROWS, D], target.dtype.element_ty)
            tl.store(pointers, zeros, mask=(line < total) & (column < DIM))


@triton.jit(do_not_specialize=[*arguments.RUNTIME, "blocks"])
def prologue_kernel(
    out, dout, lse, dlse, rows, accumulated, counters, dbias, dsinks, dq, dk, dv, bias, slopes, sinks, cu_q, cu_k, lo,
    hi, rng, mailbox, stride_ob, stride_om, stride_oh, stride_od, stride_yb, stride_ym, stride_yh, stride_yd,
    stride_xb, stride_xm, stride_xh, stride_xd, stride_zb, stride_zm, stride_zh, stride_zd, stride_wb, stride_wm,
    stride_wh, stride_wd, batch, heads, group, max_q, max_k, total_q, total_k, padded, scratch, blocks, tiles,
    programs, section, keep_scale,
    ROWS: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, DV: tl.constexpr, DIM_V: tl.constexpr,
    VARLEN: tl.constexpr, SINKS: tl.constexpr, DLSE: tl.constexpr, DBIAS: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    tile, bh = place(tl.program_id(0), tiles, programs, section)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    if VARLEN:
        if b == batch:
            if h == 0:
                start = past_end(cu_q, batch, total_q)
                _blank(dq, start, total_q, tile, tiles, stride_xm, stride_xh, stride_xd, heads, DIM, D, ROWS)
                start = past_end(cu_k, batch, total_k)
                kv_heads = heads // group
                _blank(dk, start, total_k, tile, tiles, stride_zm, stride_zh, stride_zd, kv_heads, DIM, D, ROWS)
                _blank(dv, start, total_k, tile, tiles, stride_wm, stride_wh, stride_wd, kv_heads, DIM_V, DV, ROWS)
            return
    q_start, q_len = sequence(cu_q, b, max_q, total_q, 0, mailbox, VARLEN, False)
    first_row = tile * ROWS
    if SINKS:
        tl.store(dsinks + bh * tiles + tile, 0.0)
    if first_row >= (q_len + 127) // 128 * 128:
        return
    stride_ob, stride_om, stride_oh = stride_ob * ALIGN, stride_om * ALIGN, stride_oh * ALIGN
    stride_yb, stride_ym, stride_yh = stride_yb * ALIGN, stride_ym * ALIGN, stride_yh * ALIGN
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, DV)
    inside = row < q_len
    both = inside[:, None] & (column < DIM_V)[None, :]
    at = (q_start + row).to(tl.int64)[:, None]
    if VARLEN:
        _, k_len = sequence(cu_k, b, max_k, total_k, 2, mailbox, VARLEN, False)
        if k_len == 0:
            of_head = dq + h * stride_xh
            wide = tl.arange(0, D)
            zeros = tl.zeros([ROWS, D], dq.dtype.element_ty)
            tl.store(
                of_head + at * stride_xm + wide[None, :] * stride_xd, zeros, inside[:, None] & (wide < DIM)[None, :]
            )
    o = tl.load(out + b * stride_ob + h * stride_oh + at * stride_om + column[None, :] * stride_od, both, 0.0)
    do = tl.load(dout + b * stride_yb + h * stride_yh + at * stride_ym + column[None, :] * stride_yd, both, 0.0)
    per_row = (h * total_q + q_start if VARLEN else (b * heads + h) * max_q) + row
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
        kept_delta = delta / keep_scale if keep_scale > 0.0 else delta * 0.0
    tl.store(rows + scratch + scratch_at + tl.arange(0, ROWS), kept_delta)
    tl.store(counters + scratch_at // ROWS, 0)
    tl.store(counters + blocks + scratch_at // ROWS, 0)
    weight = tl.zeros([ROWS], tl.float32)
    if SINKS:
        weight = tl.exp2(tl.load(sinks + h).to(tl.float32) * LOG2E - lse_row)
        tl.store(dsinks + bh * tiles + tile, -tl.sum(weight * delta, 0))
    if DBIAS == "row":
        # The sum of dS = P (dP - delta) over all keys: P sums to 1 less the sink's share, P dP to dO O.
        total = tl.where(lse_row == float("inf"), 0.0, product - delta * (1.0 - weight))
        tl.store(dbias + (b * heads + h) * max_q + row, total, mask=inside)
    zeros = tl.zeros([ROWS * D], tl.float32)
    tl.store(accumulated + scratch_at.to(tl.int64) * D + tl.arange(0, ROWS * D), zeros)


def run(problem: Problem, call: Call, tensors: tuple[Tensor, ...], kind: str, dlse: bool) -> None:
    """tensors: out, dout, lse, dlse, rows, dq's accumulator, counters, dbias, dsinks (stand-ins for absent ones), dq,
    dk, dv.
    """
    make = partial(prepare, tensors=tensors)
    launch.run(prologue_kernel, problem, call, (), tensors, make, (kind, dlse))


def tiles(problem: Problem) -> int:
    """Programs for the rows of one head."""
    return 128 // ROWS * max(1, triton.cdiv(problem.q_len, 128))


def prepare(
    problem: Problem, call: Call, boxed: tuple[Tensor, ...], variant: tuple[Any, ...], tensors: tuple[Tensor, ...]
) -> launch.Plan:
    out, dout, *_, dq, dk, dv = tensors
    kind, dlse = variant
    programs = (problem.batch + problem.varlen) * problem.q_heads
    strides, align = aligned_strides(problem, {"o": out, "y": dout})
    gradients, _ = aligned_strides(problem, {"x": dq, "z": dk, "w": dv}, align=1)
    values = {
        **arguments.scalars(problem, call),
        **strides,
        **gradients,
        "ALIGN": align,
        "blocks": arguments.scratch_rows(problem) // ROWS,
        "tiles": tiles(problem),
        "programs": programs,
        "section": 1,
        "ROWS": ROWS,
        "D": descriptors.width(problem.qk_dim),
        "DIM": problem.qk_dim,
        "DV": descriptors.width(problem.v_dim),
        "DIM_V": problem.v_dim,
        "VARLEN": problem.varlen,
        "SINKS": problem.sinks,
        "DLSE": dlse,
        "DBIAS": kind,
        "DROPOUT": problem.dropout_p > 0,
    }
    return launch.Plan(tiles(problem) * programs, values, {"num_warps": 4, "enable_fp_fusion": True}, lambda boxed: ())
