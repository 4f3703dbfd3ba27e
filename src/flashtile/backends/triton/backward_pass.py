"""Backward by recomputation (FlashAttention-2, section 3.2), in two passes that need no atomics and repeat bitwise.

    P = exp2(S - lse)      dP = dO V^T            dS = P (dP - delta),  delta = rowsum(dO O) - dlse
    over query tiles:      dQ += dS K             (this pass also computes and keeps delta)
    over key tiles:        dV += P^T dO           dK += dS^T Q

The scores are recomputed in both passes, seven products in all instead of five; in return no float32 copy of dQ exists
and nothing depends on the order in which programs finish. Heads that share a key-value head are summed in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.backends.triton import bias_gradient, configs, launch
from flashtile.backends.triton.tiles import (
    LOG2E,
    blank,
    dot,
    dot_add,
    interval,
    keep,
    key_interval,
    load_tile,
    offsets,
    past_end,
    place,
    score,
    sequence,
    split,
)
from flashtile.masks import rows_seeing
from flashtile.merge import sink_gradient
from flashtile.problem import Call, Problem


@triton.jit
def _walk_keys(
    dq, row_sum, q, do, lse, delta, start, stop, k_ptrs, v_ptrs, bias_ptrs, dbias_ptrs,
    stride_kn, stride_vn, stride_bn, stride_gn, row, q_len, k_len, begin, end, scale, softcap, slope, bh, rng,
    threshold, keep_scale,
    BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, DBIAS: tl.constexpr,
    MASKED: tl.constexpr, LEFT: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The key tiles from start to stop added to dq (and to the row sums of dS, for a bias that is one per row)."""
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
        inside = (row < q_len)[:, None] & (col < k_len)[None, :]
        bias_tile = s
        if BIAS != "none":
            bias_tile = tl.load(bias_ptrs + first * stride_bn, mask=inside, other=0.0)
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
            dp = tl.where(keep(row[:, None], col[None, :], bh, rng, threshold), dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if DBIAS == "tile":
            tl.store(dbias_ptrs + first * stride_gn, ds.to(dbias_ptrs.dtype.element_ty), mask=inside)
        elif DBIAS == "row":
            row_sum += tl.sum(ds, 1)
        if SOFTCAP:
            ds = ds * (1.0 - capped * capped)
        dq = dot_add(ds.to(k.dtype), k, dq, PRECISION, WIDEN)
    return dq, row_sum


@triton.jit(do_not_specialize=launch.RUNTIME)
def queries_kernel(
    q, k, v, out, do, lse, dlse, delta, dq, dbias, bias, slopes, sinks, cu_q, cu_k, lo, hi, rng, mailbox,
    stride_qb, stride_qm, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd, stride_ob, stride_om, stride_oh, stride_od,
    stride_yb, stride_ym, stride_yh, stride_yd, stride_xb, stride_xm, stride_xh, stride_xd,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_gb, stride_gh, stride_gm, stride_gn, stride_sb, stride_tb,
    batch, heads, group, max_q, max_k, total_q, total_k, tiles, programs, section, left, right,
    scale, softcap, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VARLEN: tl.constexpr, KIND: tl.constexpr, LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, DBIAS: tl.constexpr,
    DLSE: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, bh = place(tiles, programs, section)
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
    line = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    at = (q_start + first_row).to(tl.int64)
    q += b * stride_qb + h * stride_qh + at * stride_qm
    out += b * stride_ob + h * stride_oh + at * stride_om
    do += b * stride_yb + h * stride_yh + at * stride_ym
    dq += b * stride_xb + at * stride_xm
    k += b * stride_kb + h // group * stride_kh + k_start.to(tl.int64) * stride_kn
    v += b * stride_vb + h // group * stride_vh + k_start.to(tl.int64) * stride_vn
    bias += b * stride_bb + h * stride_bh + first_row.to(tl.int64) * stride_bm
    per_row = h * total_q + q_start if VARLEN else (b * heads + h) * max_q
    k_ptrs = k + offsets(lane[:, None], d[None, :], stride_kn, stride_kd)
    v_ptrs = v + offsets(lane[:, None], dv[None, :], stride_vn, stride_vd)
    bias_ptrs = bias + offsets(line[:, None], lane[None, :], stride_bm, stride_bn)
    if DBIAS == "tile":
        dbias += b * stride_gb + h * stride_gh + first_row.to(tl.int64) * stride_gm
    dbias_ptrs = dbias + offsets(line[:, None], lane[None, :], stride_gm, stride_gn)

    q_ptrs = q + offsets(line[:, None], d[None, :], stride_qm, stride_qd)
    q_tile = load_tile(q_ptrs, row[:, None], q_len, d[None, :], D, BLOCK_D == D, True)
    do_ptrs = do + offsets(line[:, None], dv[None, :], stride_ym, stride_yd)
    do_tile = load_tile(do_ptrs, row[:, None], q_len, dv[None, :], DV, BLOCK_DV == DV, True)
    o_ptrs = out + offsets(line[:, None], dv[None, :], stride_om, stride_od)
    o_tile = load_tile(o_ptrs, row[:, None], q_len, dv[None, :], DV, BLOCK_DV == DV, True)
    delta_row = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    if DLSE:
        delta_row -= tl.load(dlse + per_row + row, mask=row < q_len, other=0.0)
    tl.store(delta + per_row + row, delta_row, mask=row < q_len)
    lse_row = tl.load(lse + per_row + row, mask=row < q_len, other=float("inf")) * LOG2E
    lse_row = tl.where(lse_row == -float("inf"), 0.0, lse_row)  # such a row sees nothing: all its scores are -inf
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
            dq_tile, row_sum, q_tile, do_tile, lse_row, delta_row, start, full, k_ptrs, v_ptrs, bias_ptrs, dbias_ptrs,
            stride_kn, stride_vn, stride_bn, stride_gn, row, q_len, k_len, begin, end, scale, softcap, slope, bh, rng,
            threshold, keep_scale, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV, SOFTCAP, ALIBI, BIAS, DROPOUT, DBIAS,
            True, True, PRECISION, WIDEN, STAGES,
        )  # fmt: skip
    dq_tile, row_sum = _walk_keys(
        dq_tile, row_sum, q_tile, do_tile, lse_row, delta_row, full, partial, k_ptrs, v_ptrs, bias_ptrs, dbias_ptrs,
        stride_kn, stride_vn, stride_bn, stride_gn, row, q_len, k_len, begin, end, scale, softcap, slope, bh, rng,
        threshold, keep_scale, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV, SOFTCAP, ALIBI, BIAS, DROPOUT, DBIAS,
        False, False, PRECISION, WIDEN, STAGES,
    )  # fmt: skip
    dq_tile, row_sum = _walk_keys(
        dq_tile, row_sum, q_tile, do_tile, lse_row, delta_row, partial, stop, k_ptrs, v_ptrs, bias_ptrs, dbias_ptrs,
        stride_kn, stride_vn, stride_bn, stride_gn, row, q_len, k_len, begin, end, scale, softcap, slope, bh, rng,
        threshold, keep_scale, BLOCK_N, D, DV, BLOCK_D, BLOCK_DV, SOFTCAP, ALIBI, BIAS, DROPOUT, DBIAS,
        True, LEFT, PRECISION, WIDEN, STAGES,
    )  # fmt: skip
    if DBIAS == "row":
        tl.store(dbias + (b * heads + h) * max_q + row, row_sum, mask=row < q_len)
    dq_ptrs = dq + offsets(line[:, None], d[None, :], stride_xm, stride_xd)
    inside = (row[:, None] < q_len) & (d[None, :] < D)
    tl.store(dq_ptrs, (dq_tile * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _walk_queries(
    dk, dv_sum, col_sum, k, v, start, stop, q_ptrs, do_ptrs, bias_ptrs, lse, delta,
    stride_qm, stride_ym, stride_bm, col, q_len, k_len, begin, end, scale, softcap, slope, bh, rng,
    threshold, keep_scale,
    BLOCK_M: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, DBIAS: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The query tiles from start to stop added to dk and dv; scores are transposed here, [BLOCK_N, BLOCK_M].

    Rows past the end load lse = +inf, so their weights are 0 and need no mask.
    """
    line = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for m in tl.range(start, stop, BLOCK_M, num_stages=STAGES):
        m = tl.multiple_of(m, BLOCK_M)
        row = m + line
        first = m.to(tl.int64)
        q = load_tile(q_ptrs + first * stride_qm, row[:, None], q_len, d[None, :], D, BLOCK_D == D, MASKED)
        do = load_tile(do_ptrs + first * stride_ym, row[:, None], q_len, dv[None, :], DV, BLOCK_DV == DV, MASKED)
        if MASKED:
            lse_row = tl.load(lse + row, mask=row < q_len, other=float("inf")) * LOG2E
            delta_row = tl.load(delta + row, mask=row < q_len, other=0.0)
        else:
            lse_row = tl.load(lse + row) * LOG2E
            delta_row = tl.load(delta + row)
        lse_row = tl.where(lse_row == -float("inf"), 0.0, lse_row)
        s = dot(k, tl.trans(q), PRECISION, WIDEN)  # [BLOCK_N, BLOCK_M]
        bias_tile = s
        if BIAS != "none":
            inside = (row < q_len)[None, :] & (col < k_len)[:, None]
            bias_tile = tl.load(bias_ptrs + first * stride_bm, mask=inside, other=0.0)
        s, capped = score(
            s, row[None, :], col[:, None], k_len - q_len, scale, softcap, slope, bias_tile, SOFTCAP, ALIBI, BIAS
        )
        p = tl.exp2(s - lse_row[None, :])
        if MASKED:
            p = tl.where((row[None, :] >= begin[:, None]) & (row[None, :] < end[:, None]), p, 0.0)
        dp = dot(v, tl.trans(do), PRECISION, WIDEN)
        if DROPOUT:
            kept = keep(row[None, :], col[:, None], bh, rng, threshold)
            dv_sum = dot_add(tl.where(kept, p * keep_scale, 0.0).to(do.dtype), do, dv_sum, PRECISION, WIDEN)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        else:
            dv_sum = dot_add(p.to(do.dtype), do, dv_sum, PRECISION, WIDEN)
        ds = p * (dp - delta_row[None, :])
        if DBIAS == "column":
            col_sum += tl.sum(ds, 1)
        if SOFTCAP:
            ds = ds * (1.0 - capped * capped)
        dk = dot_add(ds.to(q.dtype), q, dk, PRECISION, WIDEN)
    return dk, dv_sum, col_sum


@triton.jit(do_not_specialize=launch.RUNTIME)
def keys_kernel(
    q, k, v, do, lse, delta, dk, dv, dbias, first_rows, end_rows, bias, slopes, sinks, cu_q, cu_k, lo, hi, rng, mailbox,
    stride_qb, stride_qm, stride_qh, stride_qd, stride_kb, stride_kn, stride_kh, stride_kd,
    stride_vb, stride_vn, stride_vh, stride_vd, stride_yb, stride_ym, stride_yh, stride_yd,
    stride_xb, stride_xn, stride_xh, stride_xd, stride_wb, stride_wn, stride_wh, stride_wd,
    stride_bb, stride_bh, stride_bm, stride_bn, stride_sb, stride_tb,
    batch, heads, group, max_q, max_k, total_q, total_k, tiles, programs, section, left, right,
    scale, softcap, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, VARLEN: tl.constexpr, KIND: tl.constexpr, LEFT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, DBIAS: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tile, bh = place(tiles, programs, section)
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

    col = first_key + tl.arange(0, BLOCK_N)
    line = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    vd = tl.arange(0, BLOCK_DV)
    at = (k_start + first_key).to(tl.int64)
    k_ptrs = k + b * stride_kb + kv_h * stride_kh + at * stride_kn
    k_ptrs += offsets(lane[:, None], d[None, :], stride_kn, stride_kd)
    v_ptrs = v + b * stride_vb + kv_h * stride_vh + at * stride_vn
    v_ptrs += offsets(lane[:, None], vd[None, :], stride_vn, stride_vd)
    k_tile = load_tile(k_ptrs, col[:, None], k_len, d[None, :], D, BLOCK_D == D, True)
    v_tile = load_tile(v_ptrs, col[:, None], k_len, vd[None, :], DV, BLOCK_DV == DV, True)

    first_rows += b * stride_tb
    end_rows += b * stride_tb
    last_key = tl.minimum(first_key + BLOCK_N, k_len) - 1
    begin_first, end_first = key_interval(first_key, q_len, k_len, left, right, first_rows, end_rows, KIND)
    begin_last, end_last = key_interval(last_key, q_len, k_len, left, right, first_rows, end_rows, KIND)
    begin, end = key_interval(tl.minimum(col, last_key), q_len, k_len, left, right, first_rows, end_rows, KIND)
    start, full, partial, stop = split(begin_first, end_first, begin_last, end_last, BLOCK_M)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for g in tl.range(0, group, num_stages=1):
        h = kv_h * group + g
        query_bh = b * heads + h
        q_ptrs = q + b * stride_qb + h * stride_qh + q_start.to(tl.int64) * stride_qm
        q_ptrs += offsets(line[:, None], d[None, :], stride_qm, stride_qd)
        do_ptrs = do + b * stride_yb + h * stride_yh + q_start.to(tl.int64) * stride_ym
        do_ptrs += offsets(line[:, None], vd[None, :], stride_ym, stride_yd)
        bias_ptrs = bias + b * stride_bb + h * stride_bh + first_key.to(tl.int64) * stride_bn
        bias_ptrs += offsets(line[None, :], lane[:, None], stride_bm, stride_bn)
        per_row = h * total_q + q_start if VARLEN else query_bh * max_q
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + b * stride_sb + h).to(tl.float32)
        col_sum = tl.zeros([BLOCK_N], tl.float32)
        if KIND != "none":
            dk_tile, dv_tile, col_sum = _walk_queries(
                dk_tile, dv_tile, col_sum, k_tile, v_tile, start, full, q_ptrs, do_ptrs, bias_ptrs,
                lse + per_row, delta + per_row, stride_qm, stride_ym, stride_bm, col, q_len, k_len, begin, end,
                scale, softcap, slope, query_bh, rng, threshold, keep_scale, BLOCK_M, D, DV, BLOCK_D, BLOCK_DV,
                SOFTCAP, ALIBI, BIAS, DROPOUT, DBIAS, True, PRECISION, WIDEN, STAGES,
            )  # fmt: skip
        dk_tile, dv_tile, col_sum = _walk_queries(
            dk_tile, dv_tile, col_sum, k_tile, v_tile, full, partial, q_ptrs, do_ptrs, bias_ptrs,
            lse + per_row, delta + per_row, stride_qm, stride_ym, stride_bm, col, q_len, k_len, begin, end,
            scale, softcap, slope, query_bh, rng, threshold, keep_scale, BLOCK_M, D, DV, BLOCK_D, BLOCK_DV,
            SOFTCAP, ALIBI, BIAS, DROPOUT, DBIAS, False, PRECISION, WIDEN, STAGES,
        )  # fmt: skip
        dk_tile, dv_tile, col_sum = _walk_queries(
            dk_tile, dv_tile, col_sum, k_tile, v_tile, partial, stop, q_ptrs, do_ptrs, bias_ptrs,
            lse + per_row, delta + per_row, stride_qm, stride_ym, stride_bm, col, q_len, k_len, begin, end,
            scale, softcap, slope, query_bh, rng, threshold, keep_scale, BLOCK_M, D, DV, BLOCK_D, BLOCK_DV,
            SOFTCAP, ALIBI, BIAS, DROPOUT, DBIAS, True, PRECISION, WIDEN, STAGES,
        )  # fmt: skip
        if DBIAS == "column":
            tl.store(dbias + query_bh * max_k + col, col_sum, mask=col < k_len)
    dk_ptrs = dk + b * stride_xb + at * stride_xn + offsets(lane[:, None], d[None, :], stride_xn, stride_xd)
    dv_ptrs = dv + b * stride_wb + at * stride_wn + offsets(lane[:, None], vd[None, :], stride_wn, stride_wd)
    inside = (col < k_len)[:, None]
    tl.store(dk_ptrs, (dk_tile * scale).to(dk.dtype.element_ty), mask=inside & (d[None, :] < D))
    tl.store(dv_ptrs, dv_tile.to(dv.dtype.element_ty), mask=inside & (vd[None, :] < DV))


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
    if dout.stride(-1) != 1:
        dout = dout.contiguous()  # a broadcast gradient, such as that of out.sum(), has no rows to load
    dlse = None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    kind = bias_gradient.kind(problem) if bias_grad else "none"
    partial = bias_gradient.allocate(problem, call, kind)
    placeholder = q if partial is None else partial
    extras = launch.extras(call)
    tensors = (q, k, v, out, dout, lse, lse if dlse is None else dlse, delta, grads[0], placeholder, *extras)
    launch.run(queries_kernel, problem, call, tensors, _prepare_queries, (kind, dlse is not None))
    first_rows, end_rows = (q, q) if call.lo is None else rows_seeing(call.lo, _table(call.hi), problem.k_len)
    tensors = (q, k, v, dout, lse, delta, grads[1], grads[2], placeholder, first_rows, end_rows, *extras)
    launch.run(keys_kernel, problem, call, tensors, _prepare_keys, (kind,))
    dbias = None
    if partial is not None:
        dbias = bias_gradient.finish(problem, call, kind, partial, (dout, lse, delta))
    return dbias, None if call.sinks is None else sink_gradient(call.sinks, lse, delta)


def _table(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _prepare_queries(
    problem: Problem, call: Call, tensors: tuple[Tensor, ...], variant: tuple[object, ...]
) -> launch.Plan:
    config = configs.backward_queries(problem)
    tiles = triton.cdiv(problem.q_len, config.BLOCK_M)
    programs = (problem.batch + problem.varlen) * problem.q_heads
    q, k, v, out, dout, *_ = tensors
    kind, dlse = variant
    partial = tensors[9] if kind == "tile" else None
    values = {
        **launch.strides("q", "bmhd", q, problem.varlen),
        **launch.strides("k", "bnhd", k, problem.varlen),
        **launch.strides("v", "bnhd", v, problem.varlen),
        **launch.strides("o", "bmhd", out, problem.varlen),
        **launch.strides("y", "bmhd", dout, problem.varlen),
        **launch.strides("x", "bmhd", tensors[8], problem.varlen),
        **launch.bias_strides("g", partial),
        **launch.scalars(problem, call),
        **launch.constants(problem, config),
        "tiles": tiles,
        "programs": programs,
        "section": launch.section(problem, problem.k_len, problem.group),
        "DBIAS": kind,
        "DLSE": dlse,
    }
    return launch.Plan(tiles * programs, values, config)


def _prepare_keys(
    problem: Problem, call: Call, tensors: tuple[Tensor, ...], variant: tuple[object, ...]
) -> launch.Plan:
    config = configs.backward_keys(problem)
    tiles = triton.cdiv(problem.k_len, config.BLOCK_N)
    programs = (problem.batch + problem.varlen) * problem.kv_heads
    q, k, v, dout, _, _, dk, dv, *_ = tensors
    first_rows = tensors[9]
    values = {
        **launch.strides("q", "bmhd", q, problem.varlen),
        **launch.strides("k", "bnhd", k, problem.varlen),
        **launch.strides("v", "bnhd", v, problem.varlen),
        **launch.strides("y", "bmhd", dout, problem.varlen),
        **launch.strides("x", "bnhd", dk, problem.varlen),
        **launch.strides("w", "bnhd", dv, problem.varlen),
        **launch.scalars(problem, call),
        **launch.constants(problem, config),
        "stride_tb": first_rows.stride(0) if problem.table and first_rows.shape[0] > 1 else 0,
        "tiles": tiles,
        "programs": programs,
        "section": launch.section(problem, problem.q_len * problem.group, 1),
        "DBIAS": variant[0],
    }
    return launch.Plan(tiles * programs, values, config)
