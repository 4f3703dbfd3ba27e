"""The producer of the forward on Hopper: it takes items, and brings their queries, keys, values and biases by TMA."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.bias_tiles import axis, load_tile
from flashtile.backends.hopper.descriptors import load_rows
from flashtile.backends.hopper.rings import first_slot


@gluon.jit
def producer(q_desc, k_desc, v_desc, bias_desc, counter, pipes, shapes, change):
    """Loads the query tile of each item and its key and value tiles, last first.

    The next item's queries, which no other program has had brought into the cache, are asked for after the first two
    key tiles: earlier they would wait for the last item, later the consumers would wait for them. An item that has
    failed is done again as soon as its slot is empty, and the one found meanwhile waits.
    """
    n = first_slot()
    work = 0
    turn, tile, b, h, before = shapes.start()
    found, found_b, found_h = tile, b, h
    search = gl.to_tensor(0)
    _load_queries(q_desc, tile, b, h, search, work, pipes, shapes)
    while tile >= 0:
        row = tile * shapes.BLOCK_M
        _, q_len, _, k_len = shapes.lengths.of(b, False)
        first, _, _, stop = shapes.walk(row, b, q_len, k_len, shapes.BLOCK_M)
        early = gl.maximum(stop - 2, first) if pipes.queries.STAGES == 2 else first
        n = _load_keys(k_desc, v_desc, bias_desc, row, b, h, stop, stop, early, n, pipes, shapes, change)
        if pipes.queries.STAGES == 1:
            n = _load_last_values(v_desc, b, h, first, n, pipes, shapes)
        work += 1
        if search == 0:
            turn, found, found_b, found_h, before = shapes.next(turn, found_b, before, counter)
        next_tile, next_b, next_h, search = _choose(found, found_b, found_h, work, pipes)
        if pipes.queries.STAGES == 2:
            if next_tile >= 0:
                _load_queries(q_desc, next_tile, next_b, next_h, search, work, pipes, shapes)
            n = _load_keys(k_desc, v_desc, bias_desc, row, b, h, stop, early, first, n, pipes, shapes, change)
            n = _load_last_values(v_desc, b, h, first, n, pipes, shapes)
            if next_tile < 0:  # only this item is left
                next_tile, next_b, next_h, search = _choose(next_tile, next_b, next_h, work + 1, pipes)
                _load_queries(q_desc, next_tile, next_b, next_h, search, work, pipes, shapes)
        else:
            _load_queries(q_desc, next_tile, next_b, next_h, search, work, pipes, shapes)
        tile, b, h = next_tile, next_b, next_h


@gluon.jit
def _choose(tile, b, h, work, pipes):
    """(tile, sequence, head, search) of the next item: the given one, or again the last one in the slot of `work`."""
    search = gl.to_tensor(0)
    if pipes.PIECES == 0:
        pipes.queries.await_empty(work)
        search = pipes.places.failed(work)
        if search != 0:
            tile, b, h, search = pipes.places.read(work)
    return tile, b, h, search


@gluon.jit
def _load_queries(q_desc, tile, b, h, search, work, pipes, shapes):
    """The query tile of item `work`, and where it lies; only the latter where tile says that there is none."""
    pipes.queries.await_empty(work)
    pipes.places.write(work, tile, gl.where(tile >= 0, b, 0), h, search)
    if tile >= 0:
        q_start, q_len, _, _ = shapes.lengths.of(b, False)
        full = pipes.queries.expect(work, pipes.GROUPS * pipes.PANELS * q_desc.block_type.nbytes)
        for w in gl.static_range(pipes.GROUPS):
            row = tile * shapes.BLOCK_M + 64 * w
            for i in gl.static_range(pipes.PANELS):
                load_rows(
                    q_desc, full, pipes.query(work, w, i), b, h, q_start, q_len, row, shapes.lengths.VARLEN, 64 * i
                )
    else:
        pipes.queries.expect(work, 0)


@gluon.jit
def _load_keys(k_desc, v_desc, bias_desc, first_row, b, h, stop, above, below, n, pipes, shapes, change):
    """Key tiles above - 1 down to below of an item whose first is stop - 1, tile n and on, each with its bias, and the
    value tiles that are due: keys come a tile ahead, for theirs is the slot that is empty first.
    """
    BIAS_BYTES: gl.constexpr = pipes.GROUPS * bias_desc.block_type.nbytes if pipes.BIAS_TILES else 0
    BYTES: gl.constexpr = pipes.PANELS * k_desc.block_type.nbytes + BIAS_BYTES
    kv_h = h // shapes.group
    _, _, k_start, k_len = shapes.lengths.of(b, False)
    for j in range(above - below):
        tile = above - 1 - j
        key = tile * shapes.BLOCK_N
        pipes.keys.await_empty(n)
        full = pipes.keys.arrival(n)
        if pipes.TOGETHER and tile < stop - 1:
            pipes.keys.expect(n, BYTES + v_desc.block_type.nbytes)
        else:
            pipes.keys.expect(n, BYTES)
        for i in gl.static_range(pipes.PANELS):
            load_rows(k_desc, full, pipes.key(n, i), b, kv_h, k_start, k_len, key, shapes.lengths.VARLEN, 64 * i)
        if pipes.BIAS_TILES:
            bias_b, bias_h = axis(b, change.stride_bb), axis(h, change.stride_bh)
            for w in gl.static_range(pipes.GROUPS):
                load_tile(bias_desc, full, pipes.bias(n, w), bias_b, bias_h, first_row + 64 * w, key)
        if tile < stop - 1:
            if pipes.TOGETHER:
                _load_values(v_desc, b, h, tile + 1, n, pipes, shapes)
            else:
                pipes.values.claim(n - 1, v_desc.block_type.nbytes)
                _load_values(v_desc, b, h, tile + 1, n - 1, pipes, shapes)
        n += 1
    return n


@gluon.jit
def _load_last_values(v_desc, b, h, tile, n, pipes, shapes):
    """The values of an item's last key tile, number n - 1; the number of the next slot."""
    if not pipes.TOGETHER:
        n -= 1
    pipes.values.claim(n, v_desc.block_type.nbytes)
    _load_values(v_desc, b, h, tile, n, pipes, shapes)
    return n + 1


@gluon.jit
def _load_values(v_desc, b, h, tile, n, pipes, shapes):
    """A value tile to slot n, which expects it."""
    _, _, k_start, k_len = shapes.lengths.of(b, False)
    full, slot = pipes.values.arrival(n), pipes.values.slot(n)
    load_rows(v_desc, full, slot, b, h // shapes.group, k_start, k_len, tile * shapes.BLOCK_N, shapes.lengths.VARLEN)
