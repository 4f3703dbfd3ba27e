"""The loading role of the backward on Hopper: it takes items, and brings what the others need into shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from flashtile.backends.hopper.backward_work import KEYS, steps_of, whole
from flashtile.backends.hopper.bias_tiles import axis, load_tile
from flashtile.backends.hopper.descriptors import load_rows
from flashtile.backends.hopper.dialect import aggregate, load


@aggregate
class Sources:
    """What is loaded: query tiles with their rows of lse and delta, tiles of dO and of a bias for each step, keys and,
    where dP is made, values once for an item.

    spans: an item's walks, which it goes through for each grouped head.
    """

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    do: tma.tensor_descriptor
    rows: tma.tensor_descriptor
    bias: tma.tensor_descriptor
    stride_bb: gl.tensor
    stride_bh: gl.tensor

    @gluon.jit
    def load_step(self, pipes, place, spans, step, n):
        """Starts the copies for an item's step number `step`, step n of all, once its slot is empty."""
        BLOCK_M: gl.constexpr = pipes.BLOCK_M
        first, last = whole(spans)
        g = 0
        if pipes.GROUPED:
            g = step // (last - first)
        i = place.query_tile(first + step - g * (last - first), last)
        h = place.head(g)
        row = i * BLOCK_M
        BIAS_BYTES: gl.constexpr = pipes.GROUPS * self.bias.block_type.nbytes if pipes.BIAS_TILES else 0
        QUERY_BYTES: gl.constexpr = pipes.PANELS * self.q.block_type.nbytes + self.rows.block_type.nbytes
        full = pipes.queries.claim(n, QUERY_BYTES + BIAS_BYTES)
        for panel in gl.static_range(pipes.PANELS):
            slot = pipes.query_panel(n, panel)
            load_rows(self.q, full, slot, place.b, h, place.q_start, place.q_len, row, place.VARLEN, 64 * panel)
        pair = pipes.rows.index(n % pipes.queries.STAGES)
        load(self.rows, [0, (place.block(g) + i) * BLOCK_M], full, pair)
        if pipes.BIAS_TILES:
            bias_b, bias_h = axis(place.b, self.stride_bb), axis(h, self.stride_bh)
            for w in gl.static_range(pipes.GROUPS):
                load_tile(self.bias, full, pipes.bias(n, w), bias_b, bias_h, row, place.key(w))
        full = pipes.douts.full.index(n % pipes.douts.STAGES)
        mbarrier.expect(full, self.do.block_type.nbytes)
        slot = pipes.douts.slot(n)
        load_rows(self.do, full, slot, place.b, h, place.q_start, place.q_len, row, place.VARLEN)

    @gluon.jit
    def load_first(self, pipes, place, spans, turn, n):
        """Starts the copies for an item's first step, and of its keys and values once those of the last have left."""
        first, last = whole(spans)
        keys, values = pipes.of_keys(turn), pipes.of_values(turn)
        if last > first:
            if pipes.ROTATES:
                _load_keys(self.k, pipes.keys, place, keys, pipes.PANELS)
            self.load_step(pipes, place, spans, 0, n)
            if not pipes.ROTATES:
                _load_keys(self.k, pipes.keys, place, keys, pipes.PANELS)
            if pipes.MAKES != "values":
                _load_keys(self.v, pipes.values, place, values, 1)
        else:  # keys that nobody sees
            pipes.keys.await_empty(keys)
            if pipes.MAKES != "values":
                pipes.values.await_empty(values)
                pipes.values.announce(values)
            pipes.keys.announce(keys)
            if pipes.GROUPS == 1:
                # One consumer releases the keys, the other the values. Without steps nothing else keeps them together,
                # and who comes late would wait for an item that the next one has taken the place of.
                pipes.keys.await_empty(keys + 1)
                pipes.values.await_empty(values + 1)


@gluon.jit
def _load_keys(desc, ring, place, number, PANELS: gl.constexpr):
    """Starts the copy of an item's keys (or values), one tile for each consumer."""
    GROUPS: gl.constexpr = place.BLOCK_N // KEYS
    full = ring.claim(number, GROUPS * PANELS * desc.block_type.nbytes)
    for w in gl.static_range(GROUPS):
        key = place.key(w)
        for i in gl.static_range(PANELS):
            tile = ring.buffers.index((number % ring.STAGES * GROUPS + w) * PANELS + i)
            load_rows(desc, full, tile, place.b, place.kv_h, place.k_start, place.k_len, key, place.VARLEN, 64 * i)


@gluon.jit
def load_items(sources, pipes, items, mask):
    """Takes the program's items, and loads whatever the others need. For one warp."""
    n = 0
    turn = 0
    place, spans = items.take(turn, mask, 1)
    while place.tile >= 0:
        sources.load_first(pipes, place, spans, turn, n)
        steps = steps_of(place, spans)
        for step in range(1, steps):
            sources.load_step(pipes, place, spans, step, n + step)
        n += steps
        turn += 1
        # Only now: an item that waits for its program may be what all others wait for in the end.
        place, spans = items.take(turn, mask, 1)
