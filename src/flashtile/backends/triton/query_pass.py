"""Backward over query tiles: each program owns BLOCK_M rows and walks over the keys that they see.

    delta = rowsum(dO O) - dlse      for each key tile j:   P = exp2(Q K_j^T - lse)     dP = dO V_j^T
                                                            dS = P (dP - delta)         dQ += dS K_j

It leaves what the pass over key tiles needs of each row in a scratch: lse in base 2, +inf for rows that see nothing or
do not exist (their weights are then 0 without a mask), and delta. The gradients of sinks and of some biases are made
here too.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flashtile.backends.triton import configs, launch
from flashtile.backends.triton.tiles import blank, dot, dot_add, load_bias, load_tile, offsets, span
from flashtile.gpu import arguments
from flashtile.gpu.intervals import interval, split
from flashtile.gpu.philox import keep, random_state
from flashtile.gpu.scores import LOG2E, score
from flashtile.gpu.sequences import past_end, place, scratch_row, sequence
from flashtile.problem import Call, Problem


@triton.jit
def _walk_keys(
    dq, row_sum, q, do, lse, delta, start, stop, k_ptrs, v_ptrs, bias_ptrs, dbias_ptrs, stride_kn, stride_vn,
    stride_bn, stride_gn, first_row, row, q_len, k_len, begin, end, scale, softcap, slope, bh, state, threshold,
    keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    DROPOUT: tl.constexpr, DBIAS: tl.constexpr, MASKED: tl.constexpr, LEFT: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The key tiles from start to stop added to dq (and to the row sums of dS, for a bias that is one per row)."""
    line = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        n = tl.multiple_of(n, BLOCK_N)
        col = n + lane
        first = n.to(tl.int64)
        k = load_tile(k_ptrs + first * stride_kn, col[:, None], k_len, d[None, :], D, BLOCK_D == D, MASKED)
        v = load_tile(v_ptrs + first * stride_vn, col[:, None], k_len, dv[None, :], DV, BLOCK_DV == DV, MASKED)
        s = dot(q, tl.trans(k), PRECISION, WIDEN)  # [BLOCK_M, BLOCK_N]
        bias_tile = s
        if BIAS != "none":
            bias_tile = load_bias(bias_ptrs + first * stride_bn, row[:, None], q_len, col[None, :], k_len, BIAS_ALIGN)
        s, capped = score(
            s, row[:, None], col[None, :], k_len - q_len, scale, softcap, slope, bias_tile, SOFTCAP, ALIBI, BIAS
        )
        p = tl.exp2(s - lse[:, None])
        if MASKED:
            seen = col[None, :] < end[:, None]
            if LEFT:
                seen = seen & (col[None, :] >= begin[:, None])
            p = tl.where(seen, p, 0.0)
        dp = dot(do, tl.trans(v), PRECISION, WIDEN)
        if DROPOUT:
            dp = tl.where(keep(first_row, line[:, None], n, lane[None, :], bh, state, threshold), dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if DBIAS == "tile":
            inside = (row < q_len)[:, None] & (col < k_len // BIAS_ALIGN * BIAS_ALIGN)[None, :]
            tl.store(dbias_ptrs + first * stride_gn, ds.to(dbias_ptrs.dtype.element_ty), mask=inside)
        elif DBIAS == "row":
            row_sum += tl.sum(ds, 1)
        if SOFTCAP != "none":
            ds = ds * (1.0 - capped * capped)
        dq = dot_add(ds.to(k.dtype), k, dq, PRECISION, WIDEN)
    return dq, row_sum


@triton.jit(do_not_specialize=arguments.RUNTIME)
def queries_kernel(
    q, k, v, out, do, lse, dlse, rows, dq, dbias, dsinks, bias, slopes, sinks, cu_q, cu_k, lo, hi, rng, mailbox,
    stride_qb, stride_qm, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd, stride_vb, stride_vn,
    stride_vh, stride_vd, stride_ob, stride_om, stride_oh, stride_od, stride_yb, stride_ym, stride_yh, stride_yd,
    stride_xb, stride_xm, stride_xh, stride_xd, stride_bb, stride_bh, stride_bm, stride_bn, stride_gb, stride_gh,
    stride_gm, stride_gn, stride_sb, stride_tb, batch, heads, group, max_q, max_k, total_q, total_k, padded, scratch,
    tiles, programs, section, left, right, scale, softcap, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, VARLEN: tl.constexpr, KIND: tl.constexpr, LEFT: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, BIAS: tl.constexpr, SINKS: tl.constexpr, DROPOUT: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    ALIGN: tl.constexpr, DBIAS: tl.constexpr, DLSE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    stride_qb, stride_qm, stride_qh = stride_qb * ALIGN, stride_qm * ALIGN, stride_qh * ALIGN
    stride_kb, stride_kn, stride_kh = stride_kb * ALIGN, stride_kn * ALIGN, stride_kh * ALIGN
    stride_vb, stride_vn, stride_vh = stride_vb * ALIGN, stride_vn * ALIGN, stride_vh * ALIGN
    stride_ob, stride_om, stride_oh = stride_ob * ALIGN, stride_om * ALIGN, stride_oh * ALIGN
    stride_yb, stride_ym, stride_yh = stride_yb * ALIGN, stride_ym * ALIGN, stride_yh * ALIGN
    stride_xb, stride_xm, stride_xh = stride_xb * ALIGN, stride_xm * ALIGN, stride_xh * ALIGN
    stride_bb, stride_bh, stride_bm = stride_bb * BIAS_ALIGN, stride_bh * BIAS_ALIGN, stride_bm * BIAS_ALIGN
    stride_gb, stride_gh, stride_gm = stride_gb * BIAS_ALIGN, stride_gh * BIAS_ALIGN, stride_gm * BIAS_ALIGN
    tile, bh = place(tl.program_id(0), tiles, programs, section)
    tile = tiles - 1 - tile
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    dq += h * stride_xh
    if VARLEN:
        if b == batch:
            start = past_end(cu_q, batch, total_q)
            blank(dq, start, total_q, tile, tiles, stride_xm, stride_xd, BLOCK_M, D, BLOCK_D)
            return
    q_start, q_len = sequence(cu_q, b, max_q, total_q, 0, mailbox, VARLEN, False)
    k_start, k_len = sequence(cu_k, b, max_k, total_k, 0, mailbox, VARLEN, False)
    first_row = tile * BLOCK_M
    if first_row >= q_len:
        return

    row = first_row + tl.arange(0, BLOCK_M)
    line = span(BLOCK_M, WIDE)
    lane = span(BLOCK_N, WIDE)
    d = span(BLOCK_D, WIDE)
    dv = span(BLOCK_DV, WIDE)
    at = (q_start + first_row).to(tl.int64)
    q_ptrs = (
        q + b * stride_qb + h * stride_qh + at * stride_qm + offsets(line[:, None], d[None, :], stride_qm, stride_qd)
    )
    do_ptrs = do + b * stride_yb + h * stride_yh + at * stride_ym
    do_ptrs += offsets(line[:, None], dv[None, :], stride_ym, stride_yd)
    o_ptrs = out + b * stride_ob + h * stride_oh + at * stride_om
    o_ptrs += offsets(line[:, None], dv[None, :], stride_om, stride_od)
    k_ptrs = k + b * stride_kb + h // group * stride_kh + k_start.to(tl.int64) * stride_kn
    k_ptrs += offsets(lane[:, None], d[None, :], stride_kn, stride_kd)
    v_ptrs = v + b * stride_vb + h // group * stride_vh + k_start.to(tl.int64) * stride_vn
    v_ptrs += offsets(lane[:, None], dv[None, :], stride_vn, stride_vd)
    bias_ptrs = bias + b * stride_bb + h * stride_bh + first_row.to(tl.int64) * stride_bm
    bias_ptrs += offsets(line[:, None], lane[None, :], stride_bm, stride_bn)
    dbias_ptrs = dbias + b * stride_gb + h * stride_gh + first_row.to(tl.int64) * stride_gm
    dbias_ptrs += offsets(line[:, None], lane[None, :], stride_gm, stride_gn)

    q_tile = load_tile(q_ptrs, row[:, None], q_len, d[None, :], D, BLOCK_D == D, True)
    do_tile = load_tile(do_ptrs, row[:, None], q_len, dv[None, :], DV, BLOCK_DV == DV, True)
    o_tile = load_tile(o_ptrs, row[:, None], q_len, dv[None, :], DV, BLOCK_DV == DV, True)
    per_row = (h * total_q + q_start if VARLEN else (b * heads + h) * max_q) + row
    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse + per_row, mask=row < q_len, other=0.0)
    lse_row = tl.load(lse + per_row, mask=row < q_len, other=float("inf")) * LOG2E
    lse_row = tl.where(lse_row == -float("inf"), float("inf"), lse_row)
    kept_row = rows + scratch_row(b, h, heads, q_start, padded, VARLEN) + row
    tl.store(kept_row, lse_row)
    tl.store(kept_row + scratch, delta)
    if SINKS:
        weight = tl.exp2(tl.load(sinks + h).to(tl.float32) * LOG2E - lse_row)
        tl.store(dsinks + bh * tiles + tile, -tl.sum(weight * delta, 0))
    state = random_state(rng, DROPOUT)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + b * stride_sb + h).to(tl.float32)

    lo += b * stride_tb
    hi += b * stride_tb
    last_row = tl.minimum(first_row + BLOCK_M, q_len) - 1
    begin_first, end_first = interval(first_row, q_len, k_len, left, right, lo, hi, KIND)
    begin_last, end_last = interval(last_row, q_len, k_len, left, right, lo, hi, KIND)
    begin, end = interval(tl.minimum(row, last_row), q_len, k_len, left, right, lo, hi, KIND)
    start, full, partial, stop = split(begin_first, end_first, begin_last, end_last, BLOCK_N)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if LEFT:
        dq_tile, row_sum = _walk_keys(
            dq_tile, row_sum, q_tile, do_tile, lse_row, delta, start, full, k_ptrs, v_ptrs, bias_ptrs, dbias_ptrs,
            stride_kn, stride_vn, stride_bn, stride_gn, first_row, row, q_len, k_len, begin, end, scale, softcap,
            slope, bh, state, threshold, keep_scale, BLOCK_M, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV, SOFTCAP, ALIBI, BIAS,
            BIAS_ALIGN, DROPOUT, DBIAS, True, True, PRECISION, WIDEN, STAGES,
        )  # fmt: skip
    dq_tile, row_sum = _walk_keys(
        dq_tile, row_sum, q_tile, do_tile, lse_row, delta, full, partial, k_ptrs, v_ptrs, bias_ptrs, dbias_ptrs,
        stride_kn, stride_vn, stride_bn, stride_gn, first_row, row, q_len, k_len, begin, end, scale, softcap, slope,
        bh, state, threshold, keep_scale, BLOCK_M, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV, SOFTCAP, ALIBI, BIAS,
        BIAS_ALIGN, DROPOUT, DBIAS, False, False, PRECISION, WIDEN, STAGES,
    )  # fmt: skip
    dq_tile, row_sum = _walk_keys(
        dq_tile, row_sum, q_tile, do_tile, lse_row, delta, partial, stop, k_ptrs, v_ptrs, bias_ptrs, dbias_ptrs,
        stride_kn, stride_vn, stride_bn, stride_gn, first_row, row, q_len, k_len, begin, end, scale, softcap, slope,
        bh, state, threshold, keep_scale, BLOCK_M, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV, SOFTCAP, ALIBI, BIAS,
        BIAS_ALIGN, DROPOUT, DBIAS, True, LEFT, PRECISION, WIDEN, STAGES,
    )  # fmt: skip
    if DBIAS == "row":
        tl.store(dbias + (b * heads + h) * max_q + row, row_sum, mask=row < q_len)
    dq_ptrs = dq + b * stride_xb + at * stride_xm + offsets(line[:, None], d[None, :], stride_xm, stride_xd)
    inside = (row[:, None] < q_len) & (d[None, :] < D)
    tl.store(dq_ptrs, (dq_tile * scale).to(dq.dtype.element_ty), mask=inside)


def tiles(problem: Problem) -> int:
    """Query tiles of the longest sequence, the programs of one head; at least one, to clear rows of no sequence."""
    return max(1, int(triton.cdiv(problem.q_len, configs.backward_queries(problem).BLOCK_M)))


def prepare(problem: Problem, call: Call, tensors: tuple[Tensor, ...], variant: tuple[Any, ...]) -> launch.Plan:
    """variant: the kind of bias gradient, and whether lse has a gradient."""
    config = configs.backward_queries(problem)
    kind, dlse = variant
    q, k, v, out, dout, _, _, _, dq, dbias, *_ = tensors
    programs = (problem.batch + problem.varlen) * problem.q_heads
    dense = {"q": q, "k": k, "v": v, "o": out, "y": dout, "x": dq}
    values = {
        **launch.strides(problem, call, dense, {"g": dbias if kind == "tile" else None}),
        **arguments.scalars(problem, call),
        **launch.constants(problem, config),
        "tiles": tiles(problem),
        "programs": programs,
        "section": arguments.section(problem, problem.k_len, problem.group),
        "SINKS": problem.sinks,
        "DBIAS": kind,
        "DLSE": dlse,
    }
    return launch.Plan(tiles(problem) * programs, values, config)
