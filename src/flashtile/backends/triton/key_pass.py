"""Backward over key tiles: each program owns BLOCK_N keys and walks over the query rows that see them.

    for each query tile i:   P^T = exp2(K Q_i^T - lse_i)     dP^T = V dO_i^T       dV += P^T dO_i
                             dS^T = P^T (dP^T - delta_i)     dK += dS^T Q_i

The query heads that share the key-value head are walked through one after the other in the same loop, so dK and dV of
grouped heads are summed in registers.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from flashtile.backends.triton import configs, launch
from flashtile.backends.triton.tiles import blank, dot, dot_add, load_bias, load_tile, offsets, span
from flashtile.gpu import arguments
from flashtile.gpu.intervals import key_interval, split
from flashtile.gpu.philox import keep, random_state
from flashtile.gpu.scores import score
from flashtile.gpu.sequences import past_end, place, scratch_row, sequence
from flashtile.problem import Call, Problem


@triton.jit
def _walk_queries(
    dk, dv_sum, k, v, start, stop, q_base, do_base, bias_ptrs, rows, dbias, slopes, stride_qm, stride_qh, stride_qd,
    stride_ym, stride_yh, stride_yd, stride_bm, stride_bh, row_step, first_key, col, q_len, k_len, begin, end, scale,
    softcap, bh, group, max_k, scratch, state, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    DROPOUT: tl.constexpr, DBIAS: tl.constexpr, GROUPED: tl.constexpr, MASKED: tl.constexpr, LEFT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The query tiles from start to stop, of every grouped head, added to dk and dv; scores are [BLOCK_N, BLOCK_M]."""
    line = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q_tile = offsets(span(BLOCK_M, WIDE)[:, None], span(BLOCK_D, WIDE)[None, :], stride_qm, stride_qd)
    do_tile = offsets(span(BLOCK_M, WIDE)[:, None], span(BLOCK_DV, WIDE)[None, :], stride_ym, stride_yd)
    count = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    for index in tl.range(0, count * group if GROUPED else count, num_stages=STAGES):
        g = index * 0
        m = start + index * BLOCK_M
        if GROUPED:
            g = index // count
            m = start + (index - g * count) * BLOCK_M
        m = tl.multiple_of(m, BLOCK_M)
        row = m + line
        first = m.to(tl.int64)
        g64 = g.to(tl.int64)
        q_at = q_base + (first * stride_qm + g64 * stride_qh) + q_tile
        do_at = do_base + (first * stride_ym + g64 * stride_yh) + do_tile
        q = load_tile(q_at, row[:, None], q_len, d[None, :], D, BLOCK_D == D, True)
        do = load_tile(do_at, row[:, None], q_len, dv[None, :], DV, BLOCK_DV == DV, True)
        row_at = rows + (first + g64 * row_step) + line
        s = dot(k, tl.trans(q), PRECISION, WIDEN)  # [BLOCK_N, BLOCK_M]
        bias_tile = s
        if BIAS != "none":
            bias_at = bias_ptrs + (first * stride_bm + g64 * stride_bh)
            bias_tile = load_bias(bias_at, row[None, :], q_len, col[:, None], k_len, BIAS_ALIGN)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + g).to(tl.float32)
        s, capped = score(
            s, row[None, :], col[:, None], k_len - q_len, scale, softcap, slope, bias_tile, SOFTCAP, ALIBI, BIAS
        )
        p = tl.exp2(s - tl.load(row_at)[None, :])
        if MASKED:
            seen = row[None, :] >= begin[:, None]
            if LEFT:
                seen = seen & (row[None, :] < end[:, None])
            p = tl.where(seen, p, 0.0)
        dp = dot(v, tl.trans(do), PRECISION, WIDEN)
        if DROPOUT:
            kept = keep(m, line[None, :], first_key, lane[:, None], bh + g, state, threshold)
            dv_sum = dot_add(tl.where(kept, p * keep_scale, 0.0).to(do.dtype), do, dv_sum, PRECISION, WIDEN)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        else:
            dv_sum = dot_add(p.to(do.dtype), do, dv_sum, PRECISION, WIDEN)
        ds = p * (dp - tl.load(row_at + scratch)[None, :])
        if DBIAS == "column":
            # This program alone adds to these addresses, one tile after the other: the order never changes.
            tl.atomic_add(dbias + (bh + g) * max_k + col, tl.sum(ds, 1), mask=col < k_len, sem="relaxed")
        if SOFTCAP != "none":
            ds = ds * (1.0 - capped * capped)
        dk = dot_add(ds.to(q.dtype), q, dk, PRECISION, WIDEN)
    return dk, dv_sum


@triton.jit(do_not_specialize=arguments.RUNTIME)
def keys_kernel(
    q, k, v, do, rows, dk, dv, dbias, first_rows, end_rows, bias, slopes, sinks, cu_q, cu_k, lo, hi, rng, mailbox,
    stride_qb, stride_qm, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd, stride_vb, stride_vn,
    stride_vh, stride_vd, stride_yb, stride_ym, stride_yh, stride_yd, stride_xb, stride_xn, stride_xh, stride_xd,
    stride_wb, stride_wn, stride_wh, stride_wd, stride_bb, stride_bh, stride_bm, stride_bn, stride_sb, stride_tb,
    batch, heads, group, max_q, max_k, total_q, total_k, padded, scratch, tiles, programs, section, left, right,
    scale, softcap, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, VARLEN: tl.constexpr, KIND: tl.constexpr, LEFT: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, DBIAS: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    ALIGN: tl.constexpr, GROUPED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    stride_qb, stride_qm, stride_qh = stride_qb * ALIGN, stride_qm * ALIGN, stride_qh * ALIGN
    stride_kb, stride_kn, stride_kh = stride_kb * ALIGN, stride_kn * ALIGN, stride_kh * ALIGN
    stride_vb, stride_vn, stride_vh = stride_vb * ALIGN, stride_vn * ALIGN, stride_vh * ALIGN
    stride_yb, stride_ym, stride_yh = stride_yb * ALIGN, stride_ym * ALIGN, stride_yh * ALIGN
    stride_xb, stride_xn, stride_xh = stride_xb * ALIGN, stride_xn * ALIGN, stride_xh * ALIGN
    stride_wb, stride_wn, stride_wh = stride_wb * ALIGN, stride_wn * ALIGN, stride_wh * ALIGN
    stride_bb, stride_bh, stride_bm = stride_bb * BIAS_ALIGN, stride_bh * BIAS_ALIGN, stride_bm * BIAS_ALIGN
    tile, bh = place(tl.program_id(0), tiles, programs, section)
    kv_heads = heads // group
    b = (bh // kv_heads).to(tl.int64)
    kv_h = (bh % kv_heads).to(tl.int64)
    dk += kv_h * stride_xh
    dv += kv_h * stride_wh
    if VARLEN:
        if b == batch:
            start = past_end(cu_k, batch, total_k)
            blank(dk, start, total_k, tile, tiles, stride_xn, stride_xd, BLOCK_N, D, BLOCK_D)
            blank(dv, start, total_k, tile, tiles, stride_wn, stride_wd, BLOCK_N, DV, BLOCK_DV)
            return
    q_start, q_len = sequence(cu_q, b, max_q, total_q, 0, mailbox, VARLEN, False)
    k_start, k_len = sequence(cu_k, b, max_k, total_k, 0, mailbox, VARLEN, False)
    first_key = tile * BLOCK_N
    if first_key >= k_len:
        return

    h = kv_h * group
    col = first_key + tl.arange(0, BLOCK_N)
    line = span(BLOCK_M, WIDE)
    lane = span(BLOCK_N, WIDE)
    d = span(BLOCK_D, WIDE)
    vd = span(BLOCK_DV, WIDE)
    at = (k_start + first_key).to(tl.int64)
    q_at = q_start.to(tl.int64) if VARLEN else 0
    k_ptrs = k + b * stride_kb + kv_h * stride_kh + at * stride_kn
    v_ptrs = v + b * stride_vb + kv_h * stride_vh + at * stride_vn
    k_ptrs += offsets(lane[:, None], d[None, :], stride_kn, stride_kd)
    v_ptrs += offsets(lane[:, None], vd[None, :], stride_vn, stride_vd)
    k_tile = load_tile(k_ptrs, col[:, None], k_len, d[None, :], D, BLOCK_D == D, True)
    v_tile = load_tile(v_ptrs, col[:, None], k_len, vd[None, :], DV, BLOCK_DV == DV, True)
    q += b * stride_qb + h * stride_qh + q_at * stride_qm
    do += b * stride_yb + h * stride_yh + q_at * stride_ym
    bias_ptrs = bias + b * stride_bb + h * stride_bh + first_key.to(tl.int64) * stride_bn
    bias_ptrs += offsets(line[None, :], lane[:, None], stride_bm, stride_bn)
    rows += scratch_row(b, h, heads, q_start, padded, VARLEN)
    slopes += b * stride_sb + h
    query_bh = b * heads + h
    state = random_state(rng, DROPOUT)

    first_rows += b * stride_tb
    end_rows += b * stride_tb
    last_key = tl.minimum(first_key + BLOCK_N, k_len) - 1
    begin_first, end_first = key_interval(first_key, q_len, k_len, left, right, first_rows, end_rows, KIND)
    begin_last, end_last = key_interval(last_key, q_len, k_len, left, right, first_rows, end_rows, KIND)
    begin, end = key_interval(tl.minimum(col, last_key), q_len, k_len, left, right, first_rows, end_rows, KIND)
    start, full, partial, stop = split(begin_first, end_first, begin_last, end_last, BLOCK_M)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    if KIND != "none":
        dk_tile, dv_tile = _walk_queries(
            dk_tile, dv_tile, k_tile, v_tile, start, full, q, do, bias_ptrs, rows, dbias, slopes, stride_qm,
            stride_qh, stride_qd, stride_ym, stride_yh, stride_yd, stride_bm, stride_bh, padded, first_key, col,
            q_len, k_len, begin, end, scale, softcap, query_bh, group, max_k, scratch, state, threshold, keep_scale,
            BLOCK_M, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV, SOFTCAP, ALIBI, BIAS, BIAS_ALIGN, DROPOUT, DBIAS, GROUPED,
            True, LEFT, PRECISION, WIDEN, WIDE, STAGES,
        )  # fmt: skip
    # Rows past the end have weight 0, so without a left bound the walk needs no masked end.
    dk_tile, dv_tile = _walk_queries(
        dk_tile, dv_tile, k_tile, v_tile, full, partial if LEFT else stop, q, do, bias_ptrs, rows, dbias, slopes,
        stride_qm, stride_qh, stride_qd, stride_ym, stride_yh, stride_yd, stride_bm, stride_bh, padded, first_key,
        col, q_len, k_len, begin, end, scale, softcap, query_bh, group, max_k, scratch, state, threshold, keep_scale,
        BLOCK_M, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV, SOFTCAP, ALIBI, BIAS, BIAS_ALIGN, DROPOUT, DBIAS, GROUPED, False,
        False, PRECISION, WIDEN, WIDE, STAGES,
    )  # fmt: skip
    if LEFT:
        dk_tile, dv_tile = _walk_queries(
            dk_tile, dv_tile, k_tile, v_tile, partial, stop, q, do, bias_ptrs, rows, dbias, slopes, stride_qm,
            stride_qh, stride_qd, stride_ym, stride_yh, stride_yd, stride_bm, stride_bh, padded, first_key, col,
            q_len, k_len, begin, end, scale, softcap, query_bh, group, max_k, scratch, state, threshold, keep_scale,
            BLOCK_M, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV, SOFTCAP, ALIBI, BIAS, BIAS_ALIGN, DROPOUT, DBIAS, GROUPED,
            True, LEFT, PRECISION, WIDEN, WIDE, STAGES,
        )  # fmt: skip
    dk_ptrs = dk + b * stride_xb + at * stride_xn + offsets(lane[:, None], d[None, :], stride_xn, stride_xd)
    dv_ptrs = dv + b * stride_wb + at * stride_wn + offsets(lane[:, None], vd[None, :], stride_wn, stride_wd)
    inside = (col < k_len)[:, None]
    tl.store(dk_ptrs, (dk_tile * scale).to(dk.dtype.element_ty), mask=inside & (d[None, :] < D))
    tl.store(dv_ptrs, dv_tile.to(dv.dtype.element_ty), mask=inside & (vd[None, :] < DV))


def prepare(problem: Problem, call: Call, tensors: tuple[Tensor, ...], variant: tuple[Any, ...]) -> launch.Plan:
    """variant: the kind of bias gradient."""
    config = configs.backward_keys(problem)
    tiles = max(1, triton.cdiv(problem.k_len, config.BLOCK_N))  # one, so that rows of no sequence are cleared
    programs = (problem.batch + problem.varlen) * problem.kv_heads
    q, k, v, dout, _, dk, dv, _, first_rows, *_ = tensors
    values = {
        **launch.strides(problem, call, {"q": q, "k": k, "v": v, "y": dout, "x": dk, "w": dv}, {}),
        **arguments.scalars(problem, call),
        **launch.constants(problem, config),
        "stride_tb": first_rows.stride(0) if problem.table and first_rows.shape[0] > 1 else 0,
        "tiles": tiles,
        "programs": programs,
        "section": arguments.section(problem, problem.q_len * problem.group, 1),
        "GROUPED": problem.group > 1,
        "DBIAS": variant[0],
    }
    return launch.Plan(tiles * programs, values, config)
