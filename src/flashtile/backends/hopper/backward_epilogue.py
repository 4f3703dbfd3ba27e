"""After the backward's main kernel: dQ from its float32 accumulator, and zeros for packed rows of no sequence."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flashtile.backends.hopper import backward_configs, launch
from flashtile.backends.hopper.backward_turns import COUNTERS
from flashtile.backends.hopper.strides import aligned_strides
from flashtile.gpu import arguments
from flashtile.gpu.sequences import past_end, place, scratch_row, sequence
from flashtile.problem import Call, Problem

RUNTIME = arguments.RUNTIME
ROWS = 64  # of a program, in whose order dQ is accumulated


@triton.jit
def _blank(
    target, start, total, tile, tiles, stride_m, stride_h, stride_d, heads, DIM: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Zeros for all heads of the lines past the last sequence; the tiles of one extra item share them."""
    column = tl.arange(0, D).to(tl.int64)[None, :]
    for first in tl.range(start + tile * ROWS, total, tiles * ROWS):
        line = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        for h in tl.range(0, heads):
            pointers = target + line * stride_m + h.to(tl.int64) * stride_h + column * stride_d
            zeros = tl.zeros([ROWS, D], target.dtype.element_ty)
            tl.store(pointers, zeros, mask=(line < total) & (column < DIM))


@triton.jit(do_not_specialize=RUNTIME)
def epilogue_kernel(
    accumulated, counters, dq, dk, dv, bias, slopes, sinks, cu_q, cu_k, lo, hi, rng, mailbox, stride_xb, stride_xm,
    stride_xh, stride_xd, stride_zb, stride_zm, stride_zh, stride_zd, stride_wb, stride_wm, stride_wh, stride_wd, batch,
    heads, group, max_q, total_q, total_k, padded, tiles, programs, section, scale, keep_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, DV: tl.constexpr,
    DIM_V: tl.constexpr, VARLEN: tl.constexpr, ALIGN: tl.constexpr, CLEARED: tl.constexpr,
):  # fmt: skip
    stride_xb, stride_xm, stride_xh = stride_xb * ALIGN, stride_xm * ALIGN, stride_xh * ALIGN
    # The last heads first: their dQ still lies in the L2 cache, in part.
    tile, bh = place(tl.num_programs(0) - 1 - tl.program_id(0), tiles, programs, section)
    b = bh // heads
    h = bh % heads
    if VARLEN:
        if b == batch:
            if h == 0:
                start = past_end(cu_q, batch, total_q)
                _blank(dq, start, total_q, tile, tiles, stride_xm, stride_xh, stride_xd, heads, DIM, D, 64)
                start = past_end(cu_k, batch, total_k)
                kv_heads = heads // group
                zm, zh, wm, wh = stride_zm * ALIGN, stride_zh * ALIGN, stride_wm * ALIGN, stride_wh * ALIGN
                _blank(dk, start, total_k, tile, tiles, zm, zh, stride_zd, kv_heads, DIM, D, 64)
                _blank(dv, start, total_k, tile, tiles, wm, wh, stride_wd, kv_heads, DIM_V, DV, 64)
            return
    q_start, q_len = sequence(cu_q, b, max_q, total_q, 0, mailbox, VARLEN, False)
    first_row = tile * ROWS
    if first_row >= q_len:
        return
    at = scratch_row(b, h, heads, q_start, padded, VARLEN) + first_row
    written = True
    if not CLEARED:
        written = tl.load(counters + COUNTERS + at // ROWS) > 0  # nothing lies there where rows see no key
    at = at.to(tl.int64) * COLUMNS
    row = first_row + tl.arange(0, ROWS)
    line = (q_start + row).to(tl.int64)
    base = dq + b.to(tl.int64) * stride_xb + h.to(tl.int64) * stride_xh
    WIDTH: tl.constexpr = COLUMNS & -COLUMNS  # tensors are as large as a power of two
    for first in tl.static_range(0, COLUMNS, WIDTH):
        x = tl.load(accumulated + at + ROWS * first + tl.arange(0, ROWS * WIDTH), written, 0.0) * (scale * keep_scale)
        # part of the columns, column // 8, warp, row % 8, column % 8 // 2, row // 8 % 2, column % 2
        x = tl.reshape(x, [WIDTH // C, C // 8, 4, 8, 4, 2, 2])
        x = tl.permute(x, [2, 5, 3, 0, 1, 4, 6])
        x = tl.reshape(x, [ROWS, WIDTH])
        column = first + tl.arange(0, WIDTH)
        pointers = base + line[:, None] * stride_xm + column[None, :] * stride_xd
        tl.store(pointers, x.to(dq.dtype.element_ty), mask=(row < q_len)[:, None] & (column < DIM)[None, :])


def run(launches: launch.Launches, problem: Problem, call: Call, tensors: tuple[Tensor, ...]) -> None:
    """tensors: dq's accumulator, counters, dq, dk, dv."""
    launches.run(epilogue_kernel, (), tensors, lambda: prepare(problem, call, tensors))


def prepare(problem: Problem, call: Call, tensors: tuple[Tensor, ...]) -> launch.Plan:
    """The launch of a problem."""
    _, _, dq, dk, dv = tensors
    tiles = max(1, triton.cdiv(problem.q_len, ROWS))  # one, so that rows of no sequence are cleared
    programs = (problem.batch + problem.varlen) * problem.q_heads
    dim, v_dim = backward_configs.widths(problem)
    strides, align = aligned_strides(problem, {"x": dq, "z": dk, "w": dv})
    values = {
        **arguments.scalars(problem, call),
        **strides,
        "ALIGN": align,
        "tiles": tiles,
        "programs": programs,
        "section": 1,
        "ROWS": ROWS,
        "COLUMNS": backward_configs.accumulator_columns(problem),
        "C": backward_configs.exit_columns(problem),
        "D": dim,
        "DIM": problem.qk_dim,
        "DV": v_dim,
        "DIM_V": problem.v_dim,
        "VARLEN": problem.varlen,
        "CLEARED": backward_configs.cleared(problem),
    }
    return launch.Plan(tiles * programs, values, {"num_warps": 4, "enable_fp_fusion": True}, lambda boxed: ())
