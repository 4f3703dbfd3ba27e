"""Backward on Hopper: programs take tiles of keys one after the other, and walk over the query rows that see them.

    for each query tile i:   P^T = exp2(K Q_i^T - lse_i)     dP^T = V dO_i^T       dV += P^T dO_i
                             dS^T = P^T (dP^T - delta_i)     dK += dS^T Q_i        dQ_i += dS K

Four roles (docs/kernels/hopper_backward.md has the drawing): a warp loads; two consumer warp groups of 64 keys each
make S, P, dP and dS and keep dK and dV in their registers; one warp group makes dQ from the dS of both, for a float32
accumulator in memory (backward_reduce.py); a warp tells other programs what of it was written (backward_turns.py).
The query heads that share the key-value head are walked through one after the other, so dK and dV of grouped heads are
summed in registers, or each has items of its own, and sums wait in memory (backward_relay.py). Head dims above 128 have
consumers of their own (backward_wide.py, backward_split.py), where values are narrower in a launch for dK and dQ and
one for dV.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from flashtile.backends.hopper.backward_clear import Clearing
from flashtile.backends.hopper.backward_convert import Conversion
from flashtile.backends.hopper.backward_delta import Deltas
from flashtile.backends.hopper.backward_errands import run_errands
from flashtile.backends.hopper.backward_items import RECORD, Items
from flashtile.backends.hopper.backward_load import Sources, load_items
from flashtile.backends.hopper.backward_reduce import Reduction, reduce_items
from flashtile.backends.hopper.backward_relay import NoRelay, Relay
from flashtile.backends.hopper.backward_split import key_gradients, value_gradients
from flashtile.backends.hopper.backward_step import BiasGradient, keys_of, walk
from flashtile.backends.hopper.backward_turns import COUNTERS, Turns, notify
from flashtile.backends.hopper.backward_wide import consume_keys, consume_values
from flashtile.backends.hopper.backward_work import KEYS, Mask, Pipes, Scoring, whole
from flashtile.backends.hopper.descriptors import store_rows, swizzled
from flashtile.backends.hopper.dialect import barrier
from flashtile.backends.hopper.lengths import Lengths
from flashtile.backends.hopper.rings import Ring, barriers
from flashtile.backends.hopper.words import words
from flashtile.gpu.arguments import RUNTIME

RUNTIME = [*RUNTIME, "stride_bb", "stride_bh", "stride_bm", "stride_gb", "stride_gh"]
RUNTIME += [f"stride_{tensor}{axis}" for tensor in "oyx" for axis in "bmh"]
RUNTIME += ["first_program", "cohort", "alone", "padded_k"]


@gluon.jit
def _consume(dk_desc, dv_desc, pipes, items, mask, scoring, dbias, relay, WG: gl.constexpr):
    """dK and dV, or what the launch makes of them, of the 64 keys number WG of each item."""
    n = 0
    turn = 0
    place, spans = items.wait(turn)
    while place.tile >= 0:
        if pipes.MAKES == "keys":
            n = key_gradients(dk_desc, n, turn, items, place, spans, pipes, mask, scoring, relay, WG)
        elif pipes.MAKES == "values":
            n = value_gradients(dv_desc, n, turn, place, spans, pipes, mask, scoring, WG)
        else:
            dk, dv, n = _gradients(n, turn, items, place, spans, pipes, mask, scoring, dbias, relay, WG)
            place = items.place(turn)
            if relay.RELAYS:
                if place.is_last():
                    _store_gradients(dk_desc, dv_desc, dk, dv, turn, place, pipes, scoring, WG)
                else:
                    _leave_gradients(dk, dv, turn, place, pipes, relay, WG)
            else:
                _store_gradients(dk_desc, dv_desc, dk, dv, turn, place, pipes, scoring, WG)
        turn += 1
        place, spans = items.wait(turn)
    tma.store_wait(0)


@gluon.jit
def _gradients(n, turn, items, place, spans, pipes, mask, scoring, dbias, relay, WG: gl.constexpr):
    """dK and dV of 64 keys of one item, from step n on, and the step after it."""
    first, last = whole(spans)
    relay.await_turn(place, WG, 0)
    dk = relay.begin(place, WG, 0, pipes.D)
    dv = relay.begin(place, WG, pipes.D, pipes.DV)
    pipes.keys.await_full(pipes.of_keys(turn))
    if items.PRODUCTS == "bounded" or not pipes.ROTATES:
        pipes.values.await_full(pipes.of_values(turn))
    tma.store_wait(0)  # dK of the item before has left the slots of dS
    barrier()
    NARROW: gl.constexpr = items.PRODUCTS == "narrow"
    narrow = items.narrow(turn, pipes.value_tile(turn, WG))
    for g in range(place.together if pipes.GROUPED else 1):
        keys = keys_of(place, mask, scoring, g, WG)
        if items.PRODUCTS == "bounded":
            if narrow:
                dk, dv, n = walk(dk, dv, n, spans[WG], first, last, pipes, keys, mask, scoring, dbias, WG, True)
            else:
                dk, dv, n = walk(dk, dv, n, spans[WG], first, last, pipes, keys, mask, scoring, dbias, WG, False)
        else:
            dk, dv, n = walk(dk, dv, n, spans[WG], first, last, pipes, keys, mask, scoring, dbias, WG, NARROW)
    if pipes.ROTATES:  # also where there was no step: what is released must have been full
        pipes.values.await_full(pipes.of_values(turn))
    return dk, dv, n


@gluon.jit
def _leave_gradients(dk, dv, turn, place, pipes, relay, WG: gl.constexpr):
    """Frees the slots of the tile, and leaves dK and dV in memory for the next round."""
    pipes.await_done(turn)
    pipes.keys.release(pipes.of_keys(turn))
    pipes.values.release(pipes.of_values(turn))
    relay.leave(place, WG, dk, 0)
    relay.leave(place, WG, dv, pipes.D)
    relay.pass_on(place, WG, 0)


@gluon.jit
def _store_gradients(dk_desc, dv_desc, dk, dv, turn, place, pipes, scoring, WG: gl.constexpr):
    """dV leaves through the memory of its values, dK through the slots of dS: the next keys arrive meanwhile."""
    dtype: gl.constexpr = dk_desc.dtype
    v = pipes.value_tile(turn, WG)
    key = place.key(WG)
    scale = scoring.scale
    if scoring.DROPOUT:
        dv = dv * scoring.keep_scale
        scale = scale * scoring.keep_scale
    v.store(dv.to(dtype))
    fence_async_shared()
    barrier()
    store_rows(dv_desc, v, place.b, place.kv_h, place.k_start, place.k_len, key, place.VARLEN)
    dk = dk * scale
    pipes.await_done(turn)
    pipes.keys.release(pipes.of_keys(turn))
    k = pipes.way_out(dtype, WG)
    k.store(dk.to(dtype))
    tma.store_wait(0)
    fence_async_shared()
    barrier()
    store_rows(dk_desc, k, place.b, place.kv_h, place.k_start, place.k_len, key, place.VARLEN)
    pipes.values.release(pipes.of_values(turn))


@gluon.jit
def _play_roles(
    dk_desc, dv_desc, pipes, items, mask, scoring, bias_gradient, reduction, weights, sources, turns, errands, relay,
    CONSUME_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All warp groups at once, each in its role."""
    # Consumers come as workers: in the default partition the compiler keeps more addresses in registers than there are.
    if pipes.GROUPS == 1:
        gl.warp_specialize(
            [
                (reduce_items, (reduction, items)),
                (consume_values, (dv_desc, pipes, weights, items, mask, scoring, relay)),
                (consume_keys, (dk_desc, pipes, weights, items, mask, scoring, bias_gradient, relay)),
                (load_items, (sources, pipes, items, mask)),
                (notify, (turns,)),
            ],
            [4, 4, 1, 1],
            [CONSUME_REGISTERS, CONSUME_REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS],
        )
    elif pipes.GROUPS == 2:
        gl.warp_specialize(
            [
                (reduce_items, (reduction, items)),
                (_consume, (dk_desc, dv_desc, pipes, items, mask, scoring, bias_gradient, relay, 0)),
                (_consume, (dk_desc, dv_desc, pipes, items, mask, scoring, bias_gradient, relay, 1)),
                (load_items, (sources, pipes, items, mask)),
                (notify, (turns,)),
            ],
            [4, 4, 1, 1],
            [CONSUME_REGISTERS, CONSUME_REGISTERS, LOAD_REGISTERS, LOAD_REGISTERS],
        )
    elif pipes.MAKES == "values":
        gl.warp_specialize(
            [
                (run_errands, errands),
                (_consume, (dk_desc, dv_desc, pipes, items, mask, scoring, bias_gradient, relay, 0)),
                (_consume, (dk_desc, dv_desc, pipes, items, mask, scoring, bias_gradient, relay, 1)),
                (_consume, (dk_desc, dv_desc, pipes, items, mask, scoring, bias_gradient, relay, 2)),
                (load_items, (sources, pipes, items, mask)),
            ],
            [4, 4, 4, 1],
            [CONSUME_REGISTERS, CONSUME_REGISTERS, CONSUME_REGISTERS, LOAD_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (reduce_items, (reduction, items)),
                (_consume, (dk_desc, dv_desc, pipes, items, mask, scoring, bias_gradient, relay, 0)),
                (_consume, (dk_desc, dv_desc, pipes, items, mask, scoring, bias_gradient, relay, 1)),
                (_consume, (dk_desc, dv_desc, pipes, items, mask, scoring, bias_gradient, relay, 2)),
            ],
            [4, 4, 4],
            [CONSUME_REGISTERS, CONSUME_REGISTERS, CONSUME_REGISTERS],
        )


@gluon.jit(do_not_specialize=RUNTIME)
def backward_kernel(
    q_desc, k_desc, v_desc, do_desc, rows_desc, dq_desc, dk_desc, dv_desc, bias_desc, dbias_desc, first_rows, end_rows,
    dbias, counters, rows, out, dout, accumulated, dq, sums, bias, slopes, sinks, cu_q, cu_k, lo, hi, rng, mailbox,
    stride_bb, stride_bh, stride_bm, stride_gb, stride_gh, stride_ob, stride_om, stride_oh, stride_yb, stride_ym,
    stride_yh, stride_xb, stride_xm, stride_xh, stride_sb, stride_tb, batch, heads, group, max_q, max_k, total_q,
    total_k, padded, padded_k, scratch, tiles, alone, first_program, programs, cohort, section, left, right, scale,
    softcap, threshold, keep_scale, BLOCK_M: gl.constexpr, GROUPS: gl.constexpr, DIM: gl.constexpr, DIM_V: gl.constexpr,
    STAGES: gl.constexpr, SLOTS: gl.constexpr,
    CONSUME_REGISTERS: gl.constexpr, LOAD_REGISTERS: gl.constexpr, GROUPED: gl.constexpr, VARLEN: gl.constexpr,
    KIND: gl.constexpr, LEFT: gl.constexpr, RAGGED: gl.constexpr, SOFTCAP: gl.constexpr, ALIBI: gl.constexpr,
    BIAS: gl.constexpr, BIAS_ALIGN: gl.constexpr, BIAS_STEP: gl.constexpr, BIAS_TILES: gl.constexpr,
    DROPOUT: gl.constexpr, ORDERED: gl.constexpr, DBIAS: gl.constexpr, TURN: gl.constexpr,
    CLEARED: gl.constexpr, PRODUCTS: gl.constexpr, ROTATES: gl.constexpr, PANELS: gl.constexpr, MAKES: gl.constexpr,
    AROUND: gl.constexpr, MIRRORS: gl.constexpr, ALIGN: gl.constexpr, O_STEP: gl.constexpr, Y_STEP: gl.constexpr,
    X_STEP: gl.constexpr, COLUMNS: gl.constexpr, COLUMNS_V: gl.constexpr, COUNTER: gl.constexpr, CLEARS: gl.constexpr,
    ERRAND: gl.constexpr, RELAYS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    PANEL: gl.constexpr = k_desc.block_type.shape[-1]
    D: gl.constexpr = PANELS * PANEL
    DV: gl.constexpr = v_desc.block_type.shape[-1]
    lengths = Lengths(cu_q, cu_k, mailbox, max_q, max_k, total_q, total_k, VARLEN)
    items = Items(
        counters + COUNTER, words(2 * RECORD), barriers(2, 1), lengths, rows, heads, group, padded, scratch, tiles,
        alone, first_program, programs, cohort if RELAYS else section, section, TURN > 0, BLOCK_M, GROUPS, PRODUCTS,
        AROUND, MIRRORS, RELAYS,
    )  # fmt: skip
    mask = Mask(first_rows, end_rows, stride_tb, left, right, KIND, LEFT, LEFT or MIRRORS, RAGGED)
    scoring = Scoring(
        bias, slopes, rng, stride_bb, stride_bh, stride_bm, stride_sb, scale, softcap, threshold, keep_scale, SOFTCAP,
        ALIBI, BIAS, BIAS_ALIGN, BIAS_STEP, BIAS_TILES, DROPOUT, ORDERED,
    )  # fmt: skip
    bias_gradient = BiasGradient(
        dbias_desc, dbias, stride_gb, stride_gh, max_k, DBIAS, DBIAS == "boxes" and dbias.dtype.element_ty != gl.float32
    )

    if ROTATES:
        tiles_of_both = gl.allocate_shared_memory(dtype, [3 * GROUPS, KEYS, D], swizzled(2, D))
        keys = Ring(tiles_of_both, barriers(3, 1), barriers(3, GROUPS), 3)
        values = keys
    else:
        k_tiles = gl.allocate_shared_memory(dtype, [GROUPS * PANELS, KEYS, PANEL], swizzled(2, PANEL))
        keys = Ring(k_tiles, barriers(1, 1), barriers(1, GROUPS), 1)
        v_tiles = gl.allocate_shared_memory(dtype, [GROUPS, KEYS, DV], swizzled(2, DV))
        values = Ring(v_tiles, barriers(1, 1), barriers(1, GROUPS), 1)
    q_tiles = gl.allocate_shared_memory(dtype, [STAGES * PANELS, BLOCK_M, PANEL], swizzled(2, PANEL))
    do_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, DV], swizzled(2, DV))
    ds_tiles = do_tiles  # stands in where there is none
    if MAKES != "values":
        ds_tiles = gl.allocate_shared_memory(dtype, [GROUPS, 2 * BLOCK_M, KEYS], swizzled(2, KEYS))
    biases = ds_tiles
    if BIAS_TILES:
        biases = gl.allocate_shared_memory(dtype, [STAGES * GROUPS, BLOCK_M, KEYS], swizzled(2, KEYS))
    row_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, 2, BLOCK_M], rows_desc.layout)
    exits = row_tiles  # stands in where dQ is not made
    if MAKES != "values":
        exits = gl.allocate_shared_memory(gl.float32, [SLOTS, dq_desc.block_type.shape[0], 256], dq_desc.layout)
    zeros = exits
    if CLEARS:
        zeros = gl.allocate_shared_memory(gl.float32, dq_desc.block_type.shape, dq_desc.layout)
    clearing = Clearing(dq_desc, zeros, scratch // 64 * PANELS, CLEARS)
    deltas = Deltas(
        out, dout, rows + scratch, stride_ob * ALIGN, stride_om * ALIGN, stride_oh * ALIGN, stride_yb * ALIGN,
        stride_ym * ALIGN, stride_yh * ALIGN, heads, max_q, padded, scratch, COLUMNS_V, DV, O_STEP, Y_STEP,
        ERRAND == "delta",
    )  # fmt: skip
    conversion = Conversion(
        accumulated, counters + COUNTERS, dq, stride_xb * ALIGN, stride_xm * ALIGN, stride_xh * ALIGN, heads, max_q,
        padded, scratch, scale, COLUMNS, D, X_STEP, CLEARED, ERRAND == "dq",
    )  # fmt: skip
    WIDTH: gl.constexpr = D if MAKES == "keys" else D + DV
    numbers = counters + COUNTERS + scratch // 64
    relay = Relay(sums, numbers, heads // group, padded_k, WIDTH, True) if RELAYS else NoRelay(False)
    empty = barriers(STAGES, 2 if GROUPS == 1 else GROUPS)
    read = barriers(2, 1)
    pipes = Pipes(
        keys, values, barriers(2, 1), Ring(q_tiles, barriers(STAGES, 1), empty, STAGES), row_tiles,
        Ring(do_tiles, barriers(STAGES, 1), empty, STAGES), biases, Ring(ds_tiles, barriers(2, GROUPS), read, 2), exits,
        GROUPS, BLOCK_M, D, DV, DIM, DIM_V, SLOTS, GROUPED, BIAS_TILES, ROTATES, PANELS, MAKES,
    )  # fmt: skip
    NOTIFIES: gl.constexpr = GROUPS < 3 and (TURN > 0 or not CLEARED)
    notices = Ring(items.records.memory, items.announced, items.announced, 2)  # stands in where there are none
    if NOTIFIES:
        notices = Ring(words(2).memory, barriers(2, 1), barriers(2, 1), 2)
    turns = Turns(counters + COUNTERS, notices, CLEARED, TURN, NOTIFIES)
    weights = pipes.scores  # stands in where there is one consumer for both
    if GROUPS == 1:
        weights = Ring(ds_tiles, barriers(2, 1), read, 2)  # P, until dS takes its place
    fence_async_shared()
    barrier()
    sources = Sources(q_desc, k_desc, v_desc, do_desc, rows_desc, bias_desc, stride_bb, stride_bh)
    reduction = Reduction(dq_desc, turns, sources, pipes, mask, bias_gradient, GROUPS == 3)
    _play_roles(
        dk_desc, dv_desc, pipes, items, mask, scoring, bias_gradient, reduction, weights, sources, turns,
        (deltas, clearing, conversion), relay, CONSUME_REGISTERS, LOAD_REGISTERS,
    )  # fmt: skip
