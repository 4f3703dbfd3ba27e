"""The backward's consumers where keys are wider than 128 columns and values are not, as in latent attention: two launches.

dK and dV of 64 keys would fill a consumer's registers, and with 64 keys a program the L2 cache is what all wait for.
So one launch makes dV, and another dK and dQ; both make S and P. Keys and queries lie in panels of 64 columns, as in
the forward, and dK is held in as many parts.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtile.backends.hopper.backward_step import exponents, kept, kept_bits, keys_of, positive, score_gradients
from flashtile.backends.hopper.backward_work import KEYS, whole
from flashtile.backends.hopper.descriptors import store_rows
from flashtile.backends.hopper.dialect import barrier
from flashtile.backends.hopper.tiles import accumulator, add_row_products, left_operand, row_products


@gluon.jit
def _weights(n, m, pipes, keys, mask, scoring, WG: gl.constexpr, MASKED: gl.constexpr):
    """P^T of the query rows from m in 16 bits, negative where dropout drops it."""
    wg = WG + pipes.nil(n)
    pipes.queries.await_full(n)
    running = gl.zeros([KEYS, pipes.BLOCK_M], gl.float32, accumulator(pipes.BLOCK_M))
    for i in gl.static_range(pipes.PANELS):
        k, q = pipes.key_panel(keys.turn, wg, i), pipes.query_panel(n, i)
        running = add_row_products(running, k, q, min(64, pipes.DIM - 64 * i), i > 0)
    bits = kept_bits(m, keys, scoring)
    s = warpgroup_mma_wait(0, deps=(running,))
    lse = pipes.of_rows(n, 0, accumulator(pipes.BLOCK_M))
    x, _ = exponents(s, lse, 0.0, m, keys, mask, scoring, MASKED)
    p = gl.exp2(x)
    if scoring.DROPOUT:
        p = gl.where(kept(bits, keys), p, -p)
    return p.to(pipes.keys.buffers.dtype)


@gluon.jit
def consume_for_values(dv_desc, pipes, items, mask, scoring, WG: gl.constexpr):
    """dV of the 64 keys number WG of each item."""
    n = 0
    turn = 0
    place, spans = items.wait(turn)
    while place.tile >= 0:
        first, last = whole(spans)
        dv = gl.zeros([KEYS, pipes.DV], gl.float32, accumulator(pipes.DV))
        pipes.keys.await_full(turn)
        for g in range(place.group if pipes.GROUPED else 1):
            keys = keys_of(place, mask, scoring, g, WG)
            dv, n = _walk_for_values(dv, n, spans[WG], first, last, pipes, keys, mask, scoring, WG)
        pipes.keys.release(turn)
        if scoring.DROPOUT:
            dv = dv * scoring.keep_scale
        v = pipes.value_tile(turn, WG)
        tma.store_wait(0)
        barrier()
        v.store(dv.to(v.dtype))
        fence_async_shared()
        barrier()
        key = place.first_key + KEYS * WG
        store_rows(dv_desc, v, place.b, place.kv_h, place.k_start, place.k_len, key, place.VARLEN)
        turn += 1
        place, spans = items.wait(turn)


@gluon.jit
def _walk_for_values(dv, n, span, first, last, pipes, keys, mask, scoring, WG: gl.constexpr):
    """The query tiles of one head added to dV."""
    start, full, partial, stop = span
    if WG > 0:
        n = _pass_by(n, start - first, pipes)
    if mask.KIND != "none" or mask.RAGGED:
        for i in range(start, full):
            dv = _step_for_values(dv, n, i * pipes.BLOCK_M, pipes, keys, mask, scoring, WG, True)
            n += 1
    for i in range(gl.maximum(full, start), partial):
        dv = _step_for_values(dv, n, i * pipes.BLOCK_M, pipes, keys, mask, scoring, WG, False)
        n += 1
    if mask.LEFT:
        for i in range(gl.maximum(partial, start), stop):
            dv = _step_for_values(dv, n, i * pipes.BLOCK_M, pipes, keys, mask, scoring, WG, True)
            n += 1
        if WG < pipes.GROUPS - 1:
            n = _pass_by(n, last - stop, pipes)
    return dv, n


@gluon.jit
def _pass_by(n, count, pipes):
    """`count` steps whose rows see none of a consumer's keys. Returns the step after them."""
    for _ in range(count):
        pipes.queries.await_full(n)
        pipes.queries.release(n)
        n += 1
    return n


@gluon.jit
def _step_for_values(dv, n, m, pipes, keys, mask, scoring, WG: gl.constexpr, MASKED: gl.constexpr):
    p = _weights(n, m, pipes, keys, mask, scoring, WG, MASKED)
    if scoring.DROPOUT:
        p = positive(p)
    do = pipes.douts.wait(n)
    running = warpgroup_mma(gl.convert_layout(p, left_operand(pipes.DV)), do, dv, is_async=True)
    dv = warpgroup_mma_wait(0, deps=(running,))
    pipes.queries.release(n)
    return dv


@gluon.jit
def consume_for_keys(dk_desc, pipes, items, mask, scoring, WG: gl.constexpr):
    """dK of the 64 keys number WG of each item, and dS for dQ."""
    n = 0
    turn = 0
    place, spans = items.wait(turn)
    while place.tile >= 0:
        first, last = whole(spans)
        zeros = gl.zeros([KEYS, 64], gl.float32, accumulator(64))
        a, b, c = zeros, zeros, zeros
        pipes.keys.await_full(turn)
        pipes.values.await_full(turn)
        NARROW: gl.constexpr = items.PRODUCTS == "narrow"
        narrow = items.narrow(turn, pipes.value_tile(turn, WG))
        for g in range(place.group if pipes.GROUPED else 1):
            keys = keys_of(place, mask, scoring, g, WG)
            if items.PRODUCTS == "bounded":
                if narrow:
                    a, b, c, n = _walk_for_keys(
                        a, b, c, n, spans[WG], first, last, pipes, keys, mask, scoring, WG, True
                    )
                else:
                    a, b, c, n = _walk_for_keys(
                        a, b, c, n, spans[WG], first, last, pipes, keys, mask, scoring, WG, False
                    )
            else:
                a, b, c, n = _walk_for_keys(a, b, c, n, spans[WG], first, last, pipes, keys, mask, scoring, WG, NARROW)
        pipes.values.release(turn)
        scale = scoring.scale
        if scoring.DROPOUT:
            scale = scale * scoring.keep_scale
        pipes.await_done(turn)
        for i in gl.static_range(3):
            part = a if i == 0 else b if i == 1 else c
            pipes.key_panel(turn, WG, i).store((part * scale).to(dk_desc.dtype))
        fence_async_shared()
        barrier()
        key = place.first_key + KEYS * WG
        for i in gl.static_range(3):
            k = pipes.key_panel(turn, WG, i)
            store_rows(dk_desc, k, place.b, place.kv_h, place.k_start, place.k_len, key, place.VARLEN, 64 * i)
        tma.store_wait(0)
        pipes.keys.release(turn)
        turn += 1
        place, spans = items.wait(turn)


@gluon.jit
def _walk_for_keys(a, b, c, n, span, first, last, pipes, keys, mask, scoring, WG: gl.constexpr, NARROW: gl.constexpr):
    """The query tiles of one head added to the three parts of dK."""
    start, full, partial, stop = span
    if WG > 0:
        n = pipes.skip(n, start - first)
    if mask.KIND != "none" or mask.RAGGED:
        for i in range(start, full):
            a, b, c = _step_for_keys(a, b, c, n, i * pipes.BLOCK_M, pipes, keys, mask, scoring, WG, True, NARROW)
            n += 1
    for i in range(gl.maximum(full, start), partial):
        a, b, c = _step_for_keys(a, b, c, n, i * pipes.BLOCK_M, pipes, keys, mask, scoring, WG, False, NARROW)
        n += 1
    if mask.LEFT:
        for i in range(gl.maximum(partial, start), stop):
            a, b, c = _step_for_keys(a, b, c, n, i * pipes.BLOCK_M, pipes, keys, mask, scoring, WG, True, NARROW)
            n += 1
        if WG < pipes.GROUPS - 1:
            n = pipes.skip(n, last - stop)
    return a, b, c, n


@gluon.jit
def _step_for_keys(
    a, b, c, n, m, pipes, keys, mask, scoring, WG: gl.constexpr, MASKED: gl.constexpr, NARROW: gl.constexpr
):  # fmt: skip
    LAYOUT: gl.constexpr = accumulator(pipes.BLOCK_M)
    p = _weights(n, m, pipes, keys, mask, scoring, WG, MASKED)
    do = pipes.douts.wait(n)
    running = row_products(pipes.value_tile(keys.turn, WG + pipes.nil(n)), do, pipes.DIM_V)
    delta = pipes.of_rows(n, 1, LAYOUT)
    dp = warpgroup_mma_wait(0, deps=(running,))
    ds = score_gradients(p, dp, delta, scoring, NARROW)
    pipes.scores.await_empty(n)
    pipes.scores_of(n, WG).store(ds)
    fence_async_shared()
    ds = gl.convert_layout(ds, left_operand(64))
    a = warpgroup_mma(ds, pipes.query_panel(n, 0), a, is_async=True)
    b = warpgroup_mma(ds, pipes.query_panel(n, 1), b, is_async=True)
    c = warpgroup_mma(ds, pipes.query_panel(n, 2), c, is_async=True)
    pipes.scores.announce(n)
    a, b, c = warpgroup_mma_wait(0, deps=(a, b, c))
    pipes.queries.release(n)
    return a, b, c


@gluon.jit
def idle():
    """The role of a warp group that has nothing to do."""
