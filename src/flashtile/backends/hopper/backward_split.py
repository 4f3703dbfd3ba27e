"""The backward's consumers where keys are wider than 128 columns and values are not, as in latent attention.

dK and dV of 64 keys would fill a consumer's registers, and with 64 keys a program the L2 cache is what all wait for.
So one launch makes dK and dQ of 128 keys a program, and another dV of 192; both make S and P. Keys and queries lie in
panels of 64 columns, as in the forward, and dK is held in as many parts.
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
    """P^T of step n, the query rows from m, in 16 bits; negative where dropout drops it."""
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
def _step_of_keys(sums, n, m, pipes, keys, mask, scoring, WG: gl.constexpr, MASKED: gl.constexpr, NARROW: gl.constexpr):
    """dS^T of step n, handed over, and its product with Q added to dK, whose panels `sums` are."""
    p = _weights(n, m, pipes, keys, mask, scoring, WG, MASKED)
    do = pipes.douts.wait(n)
    running = row_products(pipes.value_tile(keys.turn, WG + pipes.nil(n)), do, pipes.DIM_V)
    delta = pipes.of_rows(n, 1, accumulator(pipes.BLOCK_M))
    dp = warpgroup_mma_wait(0, deps=(running,))
    ds = score_gradients(p, dp, delta, scoring, NARROW)
    pipes.scores.await_empty(n)
    pipes.scores_of(n, WG).store(ds)
    fence_async_shared()
    ds = gl.convert_layout(ds, left_operand(64))
    first = warpgroup_mma(ds, pipes.query_panel(n, 0), sums[0], is_async=True)
    second = warpgroup_mma(ds, pipes.query_panel(n, 1), sums[1], is_async=True)
    third = warpgroup_mma(ds, pipes.query_panel(n, 2), sums[2], is_async=True)
    pipes.scores.announce(n)
    sums = warpgroup_mma_wait(0, deps=(first, second, third))
    pipes.queries.release(n)
    return sums


@gluon.jit
def _step_of_values(dv, n, m, pipes, keys, mask, scoring, WG: gl.constexpr, MASKED: gl.constexpr):
    """The product of step n's P^T and dO added to dV."""
    p = _weights(n, m, pipes, keys, mask, scoring, WG, MASKED)
    if scoring.DROPOUT:
        p = positive(p)
    do = pipes.douts.wait(n)
    running = warpgroup_mma(gl.convert_layout(p, left_operand(pipes.DV)), do, dv, is_async=True)
    dv = warpgroup_mma_wait(0, deps=(running,))
    pipes.queries.release(n)
    return dv


@gluon.jit
def _step(sums, n, i, pipes, keys, mask, scoring, WG: gl.constexpr, MASKED: gl.constexpr, NARROW: gl.constexpr):
    """Step n, query tile i."""
    m = keys.row(i)
    if pipes.MAKES == "keys":
        return _step_of_keys(sums, n, m, pipes, keys, mask, scoring, WG, MASKED, NARROW)
    else:
        return _step_of_values(sums, n, m, pipes, keys, mask, scoring, WG, MASKED)


@gluon.jit
def _walk(sums, n, spans, pipes, keys, mask, scoring, WG: gl.constexpr, NARROW: gl.constexpr):
    """The query tiles of one head, as backward_step.walk goes through them."""
    first, last = whole(spans)
    start, full, partial, stop = spans[WG]
    if WG > 0:
        n = pipes.skip(n, start - first)
    if mask.KIND != "none" or mask.RAGGED:
        for i in range(start, full):
            sums = _step(sums, n, i, pipes, keys, mask, scoring, WG, True, NARROW)
            n += 1
    for i in range(gl.maximum(full, start), partial):
        sums = _step(sums, n, i, pipes, keys, mask, scoring, WG, False, NARROW)
        n += 1
    if mask.ENDS:
        for i in range(gl.maximum(partial, start), stop):
            sums = _step(sums, n, i, pipes, keys, mask, scoring, WG, True, NARROW)
            n += 1
        if WG < pipes.GROUPS - 1:
            n = pipes.skip(n, last - stop)
    return sums, n


@gluon.jit
def key_gradients(dk_desc, n, turn, items, place, spans, pipes, mask, scoring, relay, WG: gl.constexpr):
    """dK of the 64 keys number WG of one item, from step n on, through the memory of its keys; the step after it."""
    relay.await_turn(place, WG, 0)
    first, second = relay.begin(place, WG, 0, 64), relay.begin(place, WG, 64, 64)
    sums = (first, second, relay.begin(place, WG, 128, 64))
    pipes.keys.await_full(turn)
    pipes.values.await_full(turn)
    NARROW: gl.constexpr = items.PRODUCTS == "narrow"
    narrow = items.narrow(turn, pipes.value_tile(turn, WG))
    for g in range(place.together if pipes.GROUPED else 1):
        keys = keys_of(place, mask, scoring, g, WG)
        if items.PRODUCTS == "bounded":
            if narrow:
                sums, n = _walk(sums, n, spans, pipes, keys, mask, scoring, WG, True)
            else:
                sums, n = _walk(sums, n, spans, pipes, keys, mask, scoring, WG, False)
        else:
            sums, n = _walk(sums, n, spans, pipes, keys, mask, scoring, WG, NARROW)
    pipes.values.release(turn)
    scale = scoring.scale
    if scoring.DROPOUT:
        scale = scale * scoring.keep_scale
    pipes.await_done(turn)
    if relay.RELAYS:
        if place.is_last():
            _store_keys(dk_desc, sums, scale, turn, place, pipes, WG)
        else:
            pipes.keys.release(turn)
            for i in gl.static_range(pipes.PANELS):
                relay.leave(place, WG, sums[i], 64 * i)
            relay.pass_on(place, WG, 0)
    else:
        _store_keys(dk_desc, sums, scale, turn, place, pipes, WG)
    return n


@gluon.jit
def _store_keys(dk_desc, sums, scale, turn, place, pipes, WG: gl.constexpr):
    """dK leaves through the memory of its keys."""
    for i in gl.static_range(pipes.PANELS):
        pipes.key_panel(turn, WG, i).store((sums[i] * scale).to(dk_desc.dtype))
    fence_async_shared()
    barrier()
    key = place.key(WG)
    for i in gl.static_range(pipes.PANELS):
        k = pipes.key_panel(turn, WG, i)
        store_rows(dk_desc, k, place.b, place.kv_h, place.k_start, place.k_len, key, place.VARLEN, 64 * i)
    tma.store_wait(0)
    pipes.keys.release(turn)


@gluon.jit
def value_gradients(dv_desc, n, turn, place, spans, pipes, mask, scoring, WG: gl.constexpr):
    """dV of the same keys, through memory that no values come to."""
    dv = gl.zeros([KEYS, pipes.DV], gl.float32, accumulator(pipes.DV))
    pipes.keys.await_full(turn)
    for g in range(place.together if pipes.GROUPED else 1):
        keys = keys_of(place, mask, scoring, g, WG)
        dv, n = _walk(dv, n, spans, pipes, keys, mask, scoring, WG, True)
    pipes.keys.release(turn)
    if scoring.DROPOUT:
        dv = dv * scoring.keep_scale
    v = pipes.value_tile(turn, WG)
    tma.store_wait(0)  # dV of the item before has left
    barrier()
    v.store(dv.to(v.dtype))
    fence_async_shared()
    barrier()
    key = place.key(WG)
    store_rows(dv_desc, v, place.b, place.kv_h, place.k_start, place.k_len, key, place.VARLEN)
    return n
