"""Gradient of an additive bias: dS summed over the axes along which the bias was broadcast.

How it is made depends on the bias alone (`kind`):

    "tile"    one value per (batch, head, query, key): the pass over query tiles stores dS
    "row"     one value per query row: the same pass sums dS along each row
    "column"  one value per key: the pass over key tiles sums dS along each column
    "summed"  one value per (query, key) for several batches or heads: the kernel below recomputes dS and adds them up
              in registers, so that neither a copy per head nor an atomic is needed
"""

import triton
import triton.language as tl
from torch import Tensor

from flashtile.backends.triton import configs, launch
from flashtile.backends.triton.tiles import dot, load_bias, load_tile, offsets, span
from flashtile.gpu import arguments
from flashtile.gpu.bias_gradient import finish_sums
from flashtile.gpu.intervals import interval
from flashtile.gpu.philox import keep, random_state
from flashtile.gpu.scores import score
from flashtile.gpu.sequences import scratch_row, sequence
from flashtile.problem import Call, Problem


@triton.jit(do_not_specialize=arguments.RUNTIME)
def bias_kernel(
    q, k, v, do, rows, dbias, bias, slopes, sinks, cu_q, cu_k, lo, hi, rng, mailbox, stride_qb, stride_qm, stride_qh,
    stride_qd, stride_kb, stride_kn, stride_kh, stride_kd, stride_vb, stride_vn, stride_vh, stride_vd, stride_yb,
    stride_ym, stride_yh, stride_yd, stride_bb, stride_bh, stride_bm, stride_bn, stride_gb, stride_gh, stride_gm,
    stride_gn, stride_sb, stride_tb, batch, heads, group, max_q, max_k, total_q, total_k, padded, scratch, tiles,
    left, right, repeat_b, repeat_h, scale, softcap, threshold, keep_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, VARLEN: tl.constexpr, KIND: tl.constexpr, LEFT: tl.constexpr, SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, BIAS_ALIGN: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of dbias: the sum of dS over the repeat_b batches and repeat_h heads that share it."""
    stride_qb, stride_qm, stride_qh = stride_qb * ALIGN, stride_qm * ALIGN, stride_qh * ALIGN
    stride_kb, stride_kn, stride_kh = stride_kb * ALIGN, stride_kn * ALIGN, stride_kh * ALIGN
    stride_vb, stride_vn, stride_vh = stride_vb * ALIGN, stride_vn * ALIGN, stride_vh * ALIGN
    stride_yb, stride_ym, stride_yh = stride_yb * ALIGN, stride_ym * ALIGN, stride_yh * ALIGN
    stride_bb, stride_bh, stride_bm = stride_bb * BIAS_ALIGN, stride_bh * BIAS_ALIGN, stride_bm * BIAS_ALIGN
    stride_gb, stride_gh, stride_gm = stride_gb * BIAS_ALIGN, stride_gh * BIAS_ALIGN, stride_gm * BIAS_ALIGN
    program = tl.program_id(0)
    column_tiles = tl.cdiv(max_k, BLOCK_N)
    first_key = program % column_tiles * BLOCK_N
    program = program // column_tiles
    first_row = program % tiles * BLOCK_M
    program = program // tiles
    own_b = program // (heads // repeat_h)
    own_h = program % (heads // repeat_h)
    line = span(BLOCK_M, WIDE)
    lane = span(BLOCK_N, WIDE)
    d = span(BLOCK_D, WIDE)
    dv = span(BLOCK_DV, WIDE)
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_key + tl.arange(0, BLOCK_N)
    state = random_state(rng, DROPOUT)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    repeats = repeat_b * repeat_h
    if KIND == "band" and not VARLEN:
        # The mask is the same for all that share the tile: where no row of it sees a key there is nothing to add.
        last_row = tl.minimum(first_row + BLOCK_M, max_q) - 1
        nearest, _first_end = interval(first_row, max_q, max_k, left, right, lo, hi, KIND)
        _last_begin, furthest = interval(last_row, max_q, max_k, left, right, lo, hi, KIND)
        repeats = tl.where((furthest > first_key) & (nearest < first_key + BLOCK_N), repeats, 0)
    for index in tl.range(0, repeats, num_stages=STAGES):
        b = (own_b + index // repeat_h).to(tl.int64)
        h = (own_h + index % repeat_h).to(tl.int64)
        bh = b * heads + h
        q_start, q_len = sequence(cu_q, b, max_q, total_q, 0, mailbox, VARLEN, False)
        k_start, k_len = sequence(cu_k, b, max_k, total_k, 0, mailbox, VARLEN, False)
        at_q = (q_start + first_row).to(tl.int64)
        at_k = (k_start + first_key).to(tl.int64)
        exists = row < q_len
        q_ptrs = q + b * stride_qb + h * stride_qh + at_q * stride_qm
        q_ptrs += offsets(line[:, None], d[None, :], stride_qm, stride_qd)
        k_ptrs = k + b * stride_kb + h // group * stride_kh + at_k * stride_kn
        k_ptrs += offsets(lane[:, None], d[None, :], stride_kn, stride_kd)
        v_ptrs = v + b * stride_vb + h // group * stride_vh + at_k * stride_vn
        v_ptrs += offsets(lane[:, None], dv[None, :], stride_vn, stride_vd)
        do_ptrs = do + b * stride_yb + h * stride_yh + at_q * stride_ym
        do_ptrs += offsets(line[:, None], dv[None, :], stride_ym, stride_yd)
        q_tile = load_tile(q_ptrs, row[:, None], q_len, d[None, :], D, BLOCK_D == D, True)
        k_tile = load_tile(k_ptrs, col[:, None], k_len, d[None, :], D, BLOCK_D == D, True)
        v_tile = load_tile(v_ptrs, col[:, None], k_len, dv[None, :], DV, BLOCK_DV == DV, True)
        do_tile = load_tile(do_ptrs, row[:, None], q_len, dv[None, :], DV, BLOCK_DV == DV, True)
        row_at = rows + scratch_row(b, h, heads, q_start, padded, VARLEN) + row
        lse = tl.load(row_at, mask=exists, other=float("inf"))
        delta = tl.load(row_at + scratch, mask=exists, other=0.0)
        slope = 0.0
        if ALIBI:
            slope = tl.load(slopes + b * stride_sb + h).to(tl.float32)
        s = dot(q_tile, tl.trans(k_tile), PRECISION, WIDEN)  # [BLOCK_M, BLOCK_N]
        bias_ptrs = bias + b * stride_bb + h * stride_bh
        bias_ptrs += first_row.to(tl.int64) * stride_bm + first_key.to(tl.int64) * stride_bn
        bias_ptrs += offsets(line[:, None], lane[None, :], stride_bm, stride_bn)
        bias_tile = load_bias(bias_ptrs, row[:, None], q_len, col[None, :], k_len, BIAS_ALIGN)
        s, _ = score(
            s, row[:, None], col[None, :], k_len - q_len, scale, softcap, slope, bias_tile, SOFTCAP, ALIBI, BIAS
        )
        seen_row = tl.minimum(row, tl.maximum(q_len - 1, 0))
        begin, end = interval(seen_row, q_len, k_len, left, right, lo + b * stride_tb, hi + b * stride_tb, KIND)
        seen = (col[None, :] >= begin[:, None]) & (col[None, :] < end[:, None]) & exists[:, None]
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        dp = dot(do_tile, tl.trans(v_tile), PRECISION, WIDEN)
        if DROPOUT:
            dp = tl.where(
                keep(first_row, line[:, None], first_key, lane[None, :], bh, state, threshold), dp * keep_scale, 0.0
            )
        total += p * (dp - delta[:, None])
    dbias += own_b.to(tl.int64) * stride_gb + own_h.to(tl.int64) * stride_gh
    dbias += first_row.to(tl.int64) * stride_gm + first_key.to(tl.int64) * stride_gn
    pointers = dbias + offsets(line[:, None], lane[None, :], stride_gm, stride_gn)
    tl.store(
        pointers,
        total.to(dbias.dtype.element_ty),
        mask=(row < max_q)[:, None] & (col < max_k // BIAS_ALIGN * BIAS_ALIGN)[None, :],
    )


def finish(problem: Problem, call: Call, kind: str, partial: Tensor, dout: Tensor, rows: Tensor) -> Tensor:
    """dbias in the bias's own shape and dtype."""
    assert call.k is not None and call.v is not None
    if kind == "summed":
        tensors = (call.q, call.k, call.v, dout, rows, partial)
        launch.run(bias_kernel, problem, call, tensors, prepare, ())
    return finish_sums(problem, call, kind, partial) if kind in ("row", "column") else partial


def prepare(problem: Problem, call: Call, tensors: tuple[Tensor, ...], variant: tuple[object, ...]) -> launch.Plan:
    config = configs.backward_bias(problem)
    q, k, v, dout, _, dbias, *_ = tensors
    assert problem.bias_shape is not None
    batch, heads = problem.bias_shape[:2]
    tiles = triton.cdiv(problem.q_len, config.BLOCK_M)
    values = {
        **launch.strides(problem, call, {"q": q, "k": k, "v": v, "y": dout}, {"g": dbias}),
        **arguments.scalars(problem, call),
        **launch.constants(problem, config),
        "tiles": tiles,
        "repeat_b": problem.batch // batch,
        "repeat_h": problem.q_heads // heads,
    }
    return launch.Plan(tiles * triton.cdiv(problem.k_len, config.BLOCK_N) * batch * heads, values, config)
