"""Forward: each program owns BLOCK_M query rows and walks over the keys that they see (FlashAttention-2, section 3.1).

    for each key tile j:   S = Q K_j^T            scores in base 2, hidden ones -inf
                           m' = max(m, rowmax S)  l = l exp2(m - m') + rowsum exp2(S - m')
                           O = O exp2(m - m') + exp2(S - m') V_j
    O = O / l              lse = (m + log2 l) ln 2

Tiles that no row sees are never loaded; only tiles that some rows see in part pay for the mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtile.backends.triton import configs, launch
from flashtile.backends.triton.tiles import blank, dot, dot_add, load_bias, load_tile, offsets, span
from flashtile.gpu import arguments
from flashtile.gpu.intervals import interval, split
from flashtile.gpu.philox import keep, random_state
from flashtile.gpu.scores import LN2, LOG2E, score
from flashtile.gpu.sequences import past_end, place, sequence
from flashtile.problem import Call, Problem


@triton.jit
def _walk(
    o, l, m, q, start, stop, k_ptrs, v_ptrs, bias_ptrs, stride_kn, stride_vn, stride_bn, first_row, row, q_len, k_len,
    begin, end, scale, softcap, slope, bh, state, threshold,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, BIAS: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    DROPOUT: tl.constexpr, FOLD: tl.constexpr, MASKED: tl.constexpr, LEFT: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The key tiles from start to stop folded into (o, l, m)."""
    line = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    for n in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        n = tl.multiple_of(n, BLOCK_N)
        col = n + lane
        first = n.to(tl.int64)
        k = load_tile(k_ptrs + first * stride_kn, col[:, None], k_len, d[None, :], D, BLOCK_D == D, MASKED)
        s = dot(q, tl.trans(k), PRECISION, WIDEN)  # [BLOCK_M, BLOCK_N]
        if not FOLD:
            bias_tile = s
            if BIAS != "none":
                bias_tile = load_bias(
                    bias_ptrs + first * stride_bn, row[:, None], q_len, col[None, :], k_len, BIAS_ALIGN
                )
            s, _ = score(
                s, row[:, None], col[None, :], k_len - q_len, scale, softcap, slope, bias_tile, SOFTCAP, ALIBI, BIAS
            )
        if MASKED:
            seen = col[None, :] < end[:, None]
            if LEFT:
                seen = seen & (col[None, :] >= begin[:, None])
            s = tl.where(seen, s, -float("inf"))
        if FOLD:
            # scale > 0: the maximum of the raw products, scaled once per row, and one multiply-add per element.
            m_new = tl.maximum(m, tl.max(s, 1) * (scale * LOG2E))
            base = tl.where(m_new == -float("inf"), 0.0, m_new)
            p = tl.exp2(s * (scale * LOG2E) - base[:, None])
        else:
            m_new = tl.maximum(m, tl.max(s, 1))
            base = tl.where(m_new == -float("inf"), 0.0, m_new)
            p = tl.exp2(s - base[:, None])
        alpha = tl.exp2(m - base)
        l = l * alpha + tl.sum(p, 1)
        m = m_new
        if DROPOUT:
            p = tl.where(keep(first_row, line[:, None], n, lane[None, :], bh, state, threshold), p, 0.0)
        o = o * alpha[:, None]
        v = load_tile(v_ptrs + first * stride_vn, col[:, None], k_len, dv[None, :], DV, BLOCK_DV == DV, MASKED)
        o = dot_add(p.to(v.dtype), v, o, PRECISION, WIDEN)
    return o, l, m


@triton.jit(do_not_specialize=arguments.RUNTIME)
def forward_kernel(
    q, k, v, out, lse, bias, slopes, sinks, cu_q, cu_k, lo, hi, rng, mailbox, stride_qb, stride_qm, stride_qh,
    stride_qd, stride_kb, stride_kn, stride_kh, stride_kd, stride_vb, stride_vn, stride_vh, stride_vd, stride_ob,
    stride_om, stride_oh, stride_od, stride_bb, stride_bh, stride_bm, stride_bn, stride_sb, stride_tb, batch, heads,
    group, max_q, max_k, total_q, total_k, tiles, programs, section, left, right, scale, softcap, threshold,
    keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, VARLEN: tl.constexpr, KIND: tl.constexpr, LEFT: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, BIAS: tl.constexpr, SINKS: tl.constexpr, DROPOUT: tl.constexpr, BIAS_ALIGN: tl.constexpr,
    ALIGN: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    stride_qb, stride_qm, stride_qh = stride_qb * ALIGN, stride_qm * ALIGN, stride_qh * ALIGN
    stride_kb, stride_kn, stride_kh = stride_kb * ALIGN, stride_kn * ALIGN, stride_kh * ALIGN
    stride_vb, stride_vn, stride_vh = stride_vb * ALIGN, stride_vn * ALIGN, stride_vh * ALIGN
    stride_ob, stride_om, stride_oh = stride_ob * ALIGN, stride_om * ALIGN, stride_oh * ALIGN
    stride_bb, stride_bh, stride_bm = stride_bb * BIAS_ALIGN, stride_bh * BIAS_ALIGN, stride_bm * BIAS_ALIGN
    tile, bh = place(tl.program_id(0), tiles, programs, section)
    # The last rows see the most under a causal mask: start them first.
    tile = tiles - 1 - tile
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    d = span(BLOCK_D, WIDE)
    dv = span(BLOCK_DV, WIDE)
    out += h * stride_oh
    if VARLEN:
        lse += h * total_q
        if b == batch:
            start = past_end(cu_q, batch, total_q)
            blank(out, start, total_q, tile, tiles, stride_om, stride_od, BLOCK_M, DV, BLOCK_DV)
            for first in tl.range(start + tile * BLOCK_M, total_q, tiles * BLOCK_M):
                row = first + tl.arange(0, BLOCK_M)
                tl.store(lse + row, tl.full([BLOCK_M], -float("inf"), tl.float32), mask=row < total_q)
            return
    check = (tile == 0) & (h == 0)
    q_start, q_len = sequence(cu_q, b, max_q, total_q, 0, mailbox, VARLEN, check)
    k_start, k_len = sequence(cu_k, b, max_k, total_k, 2, mailbox, VARLEN, check)
    first_row = tile * BLOCK_M
    if first_row >= q_len:
        return
    if VARLEN:
        lse += q_start
    else:
        lse += (b * heads + h) * max_q

    row = first_row + tl.arange(0, BLOCK_M)
    kv_h = h // group
    q += b * stride_qb + h * stride_qh + (q_start + first_row).to(tl.int64) * stride_qm
    k += b * stride_kb + kv_h * stride_kh + k_start.to(tl.int64) * stride_kn
    v += b * stride_vb + kv_h * stride_vh + k_start.to(tl.int64) * stride_vn
    out += b * stride_ob + (q_start + first_row).to(tl.int64) * stride_om
    bias += b * stride_bb + h * stride_bh + first_row.to(tl.int64) * stride_bm
    lo += b * stride_tb
    hi += b * stride_tb
    line = span(BLOCK_M, WIDE)
    lane = span(BLOCK_N, WIDE)
    q_ptrs = q + offsets(line[:, None], d[None, :], stride_qm, stride_qd)
    k_ptrs = k + offsets(lane[:, None], d[None, :], stride_kn, stride_kd)
    v_ptrs = v + offsets(lane[:, None], dv[None, :], stride_vn, stride_vd)
    bias_ptrs = bias + offsets(line[:, None], lane[None, :], stride_bm, stride_bn)
    q_tile = load_tile(q_ptrs, row[:, None], q_len, d[None, :], D, BLOCK_D == D, True)

    state = random_state(rng, DROPOUT)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + b * stride_sb + h).to(tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    if SINKS:
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks + h).to(tl.float32) * LOG2E
        l += 1.0
    o = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    last_row = tl.minimum(first_row + BLOCK_M, q_len) - 1
    begin_first, end_first = interval(first_row, q_len, k_len, left, right, lo, hi, KIND)
    begin_last, end_last = interval(last_row, q_len, k_len, left, right, lo, hi, KIND)
    begin, end = interval(tl.minimum(row, last_row), q_len, k_len, left, right, lo, hi, KIND)
    start, full, partial, stop = split(begin_first, end_first, begin_last, end_last, BLOCK_N)
    if LEFT:
        o, l, m = _walk(
            o, l, m, q_tile, start, full, k_ptrs, v_ptrs, bias_ptrs, stride_kn, stride_vn, stride_bn, first_row, row,
            q_len, k_len, begin, end, scale, softcap, slope, bh, state, threshold, BLOCK_M, BLOCK_N, D, DV, BLOCK_D,
            BLOCK_DV, SOFTCAP, ALIBI, BIAS, BIAS_ALIGN, DROPOUT, FOLD, True, True, PRECISION, WIDEN, STAGES,
        )  # fmt: skip
    o, l, m = _walk(
        o, l, m, q_tile, full, partial, k_ptrs, v_ptrs, bias_ptrs, stride_kn, stride_vn, stride_bn, first_row, row,
        q_len, k_len, begin, end, scale, softcap, slope, bh, state, threshold, BLOCK_M, BLOCK_N, D, DV, BLOCK_D,
        BLOCK_DV, SOFTCAP, ALIBI, BIAS, BIAS_ALIGN, DROPOUT, FOLD, False, False, PRECISION, WIDEN, STAGES,
    )  # fmt: skip
    o, l, m = _walk(
        o, l, m, q_tile, partial, stop, k_ptrs, v_ptrs, bias_ptrs, stride_kn, stride_vn, stride_bn, first_row, row,
        q_len, k_len, begin, end, scale, softcap, slope, bh, state, threshold, BLOCK_M, BLOCK_N, D, DV, BLOCK_D,
        BLOCK_DV, SOFTCAP, ALIBI, BIAS, BIAS_ALIGN, DROPOUT, FOLD, True, LEFT, PRECISION, WIDEN, STAGES,
    )  # fmt: skip

    o = o * (keep_scale / tl.where(l == 0.0, 1.0, l))[:, None]
    tl.store(lse + row, tl.where(l == 0.0, -float("inf"), (m + tl.log2(l)) * LN2), mask=row < q_len)
    out_ptrs = out + offsets(line[:, None], dv[None, :], stride_om, stride_od)
    tl.store(out_ptrs, o.to(out.dtype.element_ty), mask=(row[:, None] < q_len) & (dv[None, :] < DV))


def forward(problem: Problem, call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of an unpacked call."""
    q, k, v = call.q, call.k, call.v
    if out is None:
        out = torch.empty(problem.out_shape, dtype=q.dtype, device=q.device)
    lse = q.new_empty(problem.lse_shape, dtype=torch.float32)
    tensors = (q, k, v, out, lse)
    launch.run(forward_kernel, problem, call, tensors, prepare, ())
    return out, lse


def prepare(problem: Problem, call: Call, tensors: tuple[Tensor, ...], variant: tuple[object, ...]) -> launch.Plan:
    config = configs.forward(problem)
    tiles = max(1, triton.cdiv(problem.q_len, config.BLOCK_M))  # one, so that rows of no sequence are cleared
    programs = (problem.batch + problem.varlen) * problem.q_heads
    q, k, v, out = tensors[:4]
    values = {
        **launch.strides(problem, call, {"q": q, "k": k, "v": v, "o": out}, {}),
        **arguments.scalars(problem, call),
        **launch.constants(problem, config),
        "tiles": tiles,
        "programs": programs,
        "section": arguments.section(problem, problem.k_len, problem.group),
        "SINKS": problem.sinks,
        "FOLD": not arguments.changes_scores(problem) and problem.scale > 0,
    }
    return launch.Plan(tiles * programs, values, config)
