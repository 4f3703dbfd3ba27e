"""The backward's consumers for head dims above 128, where dK and dV of 64 keys fill the registers of a group each.

Both know all 64 keys: one makes P and sums dV, the other makes dS from that P and sums dK. Each gradient is held as a
left and a right half, of which the right is only as wide as the head dim asks for: ptxas refuses a product whose
accumulator takes more registers than a thread starts with.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtile.backends.hopper.backward_step import (
    exponents,
    kept,
    kept_bits,
    keys_of,
    load_bias,
    positive,
    score_gradients,
)
from flashtile.backends.hopper.descriptors import store_rows
from flashtile.backends.hopper.dialect import barrier
from flashtile.backends.hopper.tiles import accumulator, left_operand, partial_sums, row_products


@gluon.constexpr_function
def _right_columns(DIM, WIDTH):
    """Columns of the right half of a gradient: a power of two, enough for what DIM has beyond the left half."""
    return min(WIDTH // 2, max(32, 1 << max(0, DIM - WIDTH // 2 - 1).bit_length()))


@gluon.jit
def _halves(relay, place, COLUMN: gl.constexpr, DIM: gl.constexpr, WIDTH: gl.constexpr):
    """The left and the right half of a gradient of 64 keys, whose first column is number COLUMN of the relay's: zeros,
    or the sum over earlier rounds.
    """
    LEFT: gl.constexpr = WIDTH // 2
    RIGHT: gl.constexpr = _right_columns(DIM, WIDTH)
    relay.await_turn(place, 0, COLUMN > 0)  # dK's number, and after it dV's
    left = relay.begin(place, 0, COLUMN, LEFT)
    return left, relay.begin(place, 0, COLUMN + LEFT, RIGHT)


@gluon.jit
def _add_product(left, right, a, b):
    """Starts to add a b to a sum in two halves; a is in registers, b a tile of rows in shared memory."""
    LEFT: gl.constexpr = left.shape[1]
    RIGHT: gl.constexpr = right.shape[1]
    left = warpgroup_mma(gl.convert_layout(a, left_operand(LEFT)), b.slice(0, LEFT, dim=1), left, is_async=True)
    right = warpgroup_mma(gl.convert_layout(a, left_operand(RIGHT)), b.slice(LEFT, RIGHT, dim=1), right, is_async=True)
    return left, right


@gluon.jit
def _weigh(left, right, n, m, pipes, weights, keys, mask, scoring, MASKED: gl.constexpr):
    """P^T of the query rows from m, handed over, and its product with dO added to dV."""
    k = pipes.key_tile(keys.turn, 0)
    bias = load_bias(m, keys, scoring)
    q = pipes.queries.wait(n)
    running = row_products(k, q, pipes.DIM)
    bits = kept_bits(m, keys, scoring)
    s = warpgroup_mma_wait(0, deps=(running,))
    lse = pipes.of_rows(n, 0, accumulator(pipes.BLOCK_M))
    x, capped = exponents(s, lse, bias, m, keys, mask, scoring, MASKED)
    p = gl.exp2(x)
    if scoring.DROPOUT:
        p = gl.where(kept(bits, keys), p, -p)
    p16 = p.to(k.dtype)
    handed = p16
    if scoring.SOFTCAP != "none":
        handed = (p * (1.0 - capped * capped)).to(k.dtype)
    if scoring.DROPOUT:
        p16 = positive(p16)
    weights.await_empty(n)
    pipes.scores_of(n, 0).store(handed)
    weights.announce(n)
    do = pipes.douts.wait(n)
    left, right = _add_product(left, right, p16, do)
    left, right = warpgroup_mma_wait(0, deps=(left, right))
    pipes.queries.release(n)
    return left, right


@gluon.jit
def _differentiate(
    left, right, sums, n, m, pipes, weights, keys, scoring, dbias, NARROW: gl.constexpr
):  # fmt: skip
    """dS^T of the query rows from m, handed over, and its product with Q added to dK. What P hides is 0 here, too."""
    LAYOUT: gl.constexpr = accumulator(pipes.BLOCK_M)
    do = pipes.douts.wait(n)
    running = row_products(pipes.value_tile(keys.turn, 0), do, pipes.DIM_V)
    weights.await_full(n)
    p = pipes.scores_of(n, 0).load(LAYOUT)
    q = pipes.queries.wait(n)
    delta = pipes.of_rows(n, 1, LAYOUT)
    dp = warpgroup_mma_wait(0, deps=(running,))
    ds = score_gradients(p, dp, delta, scoring, NARROW)
    if dbias.KIND == "column":
        sums += partial_sums(ds.to(gl.float32))
    elif dbias.KIND == "tile" or dbias.KIND == "summed":
        dbias.take(ds, m, keys, scoring)
    pipes.scores_of(n, 0).store(ds)  # where P was
    fence_async_shared()
    left, right = _add_product(left, right, ds, q)
    pipes.scores.announce(n)
    left, right = warpgroup_mma_wait(0, deps=(left, right))
    pipes.queries.release(n)
    return left, right, sums


@gluon.jit
def consume_values(dv_desc, pipes, weights, items, mask, scoring, relay):
    """dV of the program's keys."""
    n = 0
    turn = 0
    place, spans = items.wait(turn)
    while place.tile >= 0:
        n = _value_gradients(dv_desc, n, turn, place, spans[0], pipes, weights, mask, scoring, relay)
        turn += 1
        place, spans = items.wait(turn)


@gluon.jit
def _value_gradients(dv_desc, n, turn, place, span, pipes, weights, mask, scoring, relay):
    """dV of one tile of keys; the number of the step after it."""
    left, right = _halves(relay, place, pipes.D, pipes.DIM_V, pipes.DV)
    start, full, partial, stop = span
    pipes.keys.await_full(turn)
    for g in range(place.together if pipes.GROUPED else 1):
        keys = keys_of(place, mask, scoring, g, 0)
        if mask.KIND != "none" or mask.RAGGED:
            for i in range(start, full):
                left, right = _weigh(left, right, n, keys.row(i), pipes, weights, keys, mask, scoring, True)
                n += 1
        for i in range(gl.maximum(full, start), partial):
            left, right = _weigh(left, right, n, keys.row(i), pipes, weights, keys, mask, scoring, False)
            n += 1
        if mask.ENDS:
            for i in range(gl.maximum(partial, start), stop):
                left, right = _weigh(left, right, n, keys.row(i), pipes, weights, keys, mask, scoring, True)
                n += 1
    scale = 1.0
    if scoring.DROPOUT:
        scale = scoring.keep_scale
    _leave(dv_desc, left, right, scale, pipes.D, pipes.values, turn, pipes, place, relay)
    return n


@gluon.jit
def consume_keys(dk_desc, pipes, weights, items, mask, scoring, dbias, relay):
    """dK of the program's keys."""
    n = 0
    turn = 0
    place, spans = items.wait(turn)
    while place.tile >= 0:
        n = _key_gradients(dk_desc, n, turn, items, place, spans[0], pipes, weights, mask, scoring, dbias, relay)
        turn += 1
        place, spans = items.wait(turn)


@gluon.jit
def _key_gradients(dk_desc, n, turn, items, place, span, pipes, weights, mask, scoring, dbias, relay):
    """dK of one tile of keys; the number of the step after it."""
    left, right = _halves(relay, place, 0, pipes.DIM, pipes.D)
    start, _, _, stop = span
    pipes.values.await_full(turn)
    NARROW: gl.constexpr = items.PRODUCTS == "narrow"
    narrow = items.narrow(turn, pipes.value_tile(turn, 0))
    for g in range(place.together if pipes.GROUPED else 1):
        keys = keys_of(place, mask, scoring, g, 0)
        if items.PRODUCTS == "bounded":
            if narrow:
                left, right, n = _walk_keys(left, right, n, start, stop, pipes, weights, keys, scoring, dbias, True)
            else:
                left, right, n = _walk_keys(left, right, n, start, stop, pipes, weights, keys, scoring, dbias, False)
        else:
            left, right, n = _walk_keys(left, right, n, start, stop, pipes, weights, keys, scoring, dbias, NARROW)
    scale = scoring.scale
    if scoring.DROPOUT:
        scale = scale * scoring.keep_scale
    _leave(dk_desc, left, right, scale, 0, pipes.keys, turn, pipes, place, relay)
    return n


@gluon.jit
def _walk_keys(left, right, n, start, stop, pipes, weights, keys, scoring, dbias, NARROW: gl.constexpr):
    """The query tiles of one head added to dK."""
    sums = dbias.no_sums(pipes.BLOCK_M)
    for i in range(start, stop):
        m = keys.row(i)
        left, right, sums = _differentiate(left, right, sums, n, m, pipes, weights, keys, scoring, dbias, NARROW)
        n += 1
    if dbias.KIND == "column":
        dbias.store_sums(sums, keys, scoring)
    return left, right, n


@gluon.jit
def _leave(desc, left, right, scale, COLUMN: gl.constexpr, ring, turn, pipes, place, relay):
    """Stores a gradient, whose first column is number COLUMN of the relay's, or leaves its sum for the next round."""
    if relay.RELAYS:
        if place.is_last():
            _store(desc, left * scale, right * scale, ring, turn, pipes, place)
        else:
            pipes.await_done(turn)
            ring.release(turn)
            relay.leave(place, 0, left, COLUMN)
            relay.leave(place, 0, right, COLUMN + left.shape[1])
            relay.pass_on(place, 0, COLUMN > 0)
    else:
        _store(desc, left * scale, right * scale, ring, turn, pipes, place)


@gluon.jit
def _store(desc, left, right, ring, turn, pipes, place):
    """Stores a gradient through the shared memory of an item's keys or values, once no product reads them any more."""
    pipes.await_done(turn)
    tile = ring.buffers.index(0)
    LEFT: gl.constexpr = left.shape[1]
    RIGHT: gl.constexpr = right.shape[1]
    tile.slice(0, LEFT, dim=1).store(left.to(tile.dtype))
    tile.slice(LEFT, RIGHT, dim=1).store(right.to(tile.dtype))
    fence_async_shared()
    barrier()
    store_rows(desc, tile, place.b, place.kv_h, place.k_start, place.k_len, place.first_key, place.VARLEN)
    tma.store_wait(0)
    ring.release(turn)
