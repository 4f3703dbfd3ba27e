"""The role of the backward on Hopper that makes dQ from what the consumers leave, and writes it to its accumulator."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashtile.backends.hopper.backward_load import Sources
from flashtile.backends.hopper.backward_step import BiasGradient
from flashtile.backends.hopper.backward_turns import Turns
from flashtile.backends.hopper.backward_work import Mask, Pipes, steps_of, whole
from flashtile.backends.hopper.dialect import aggregate, barrier, reduce_add, store
from flashtile.backends.hopper.tiles import accumulator


@aggregate
class Reduction:
    """What makes dQ: the accumulator, who writes to it when, and what comes and leaves on the way.

    LOADS: the same warp group takes the items and loads what the others need, some steps ahead.
    """

    dq: tma.tensor_descriptor
    turns: Turns
    sources: Sources
    pipes: Pipes
    mask: Mask
    dbias: BiasGradient
    LOADS: gl.constexpr

    @gluon.jit
    def add_item(self, n, passed, place, spans):
        """dQ of all steps of an item, from step n on, after which so many blocks were passed on; both for the next."""
        GROUPS: gl.constexpr = self.pipes.GROUPS
        first, last = whole(spans)
        origin = n
        owed = gl.to_tensor(-1)
        for g in range(place.together if self.pipes.GROUPED else 1):
            block = place.block(g) + place.query_tile(first, last)
            known = place.tile, owed, passed, 0 if self.turns.STEPS > 0 else self.turns.look(block)
            begin = first
            if self.mask.KIND != "none" or self.mask.RAGGED:
                for w in gl.static_range(1, GROUPS):
                    end = spans[w][0]
                    n, known = self._add_steps(n, begin, end, g, known, origin, place, spans, 0, w)
                    begin = end
            end = spans[0][3]
            n, known = self._add_steps(n, begin, end, g, known, origin, place, spans, 0, GROUPS)
            if self.mask.ENDS:
                for w in gl.static_range(1, GROUPS):
                    begin = end
                    end = spans[w][3]
                    n, known = self._add_steps(n, begin, end, g, known, origin, place, spans, w, GROUPS)
            owed, passed = known[1], known[2]
        return n, self.turns.pass_on(owed, passed)

    @gluon.jit
    def _add_steps(self, n, begin, end, g, known, origin, place, spans, FROM: gl.constexpr, TO: gl.constexpr):
        """Steps begin to end of the g-th head, from the dS of consumers FROM to TO. origin: the item's first step.

        known: the last tile of keys that the steps before see, or this one; and owed, passed and seen, see `_add`.
        """
        first, last = whole(spans)
        furthest, owed, passed, seen = known
        turns, pipes, dbias = self.turns, self.pipes, self.dbias
        base = place.block(g)
        for i in range(begin, end):
            block = base + place.query_tile(i, last)
            gate, due, before = turns.unit(block), owed, gl.to_tensor(0)
            if turns.STEPS > 0:
                due = gl.to_tensor(-1)
                if (block == gate) | (i == first):
                    due, owed = owed, gate
                    if place.mirrored:
                        before = place.tile  # all those before it see what it sees
                    else:
                        end_of_unit = gl.minimum(gate - base + turns.STEPS, last) - 1
                        furthest = self.mask.furthest_tile(furthest, end_of_unit, place)
                        before = furthest - place.tile
            pipes.scores.await_full(n)
            if dbias.KIND == "boxes":
                dbias.send(n, i * pipes.BLOCK_M, g, pipes, place, FROM, TO)
            is_first, passed = self._add(block, n, place.turn, due, passed, seen, before, FROM, TO)
            if turns.STEPS == 0:
                owed = gl.where(is_first, block, -1)
                seen = turns.look(base + place.query_tile(gl.minimum(i + 1, last - 1), last))
            if self.LOADS:
                ahead = n - origin + pipes.queries.STAGES
                if ahead < steps_of(place, spans):
                    self.sources.load_step(pipes, place, spans, ahead, origin + ahead)
            n += 1
        return n, (furthest, owed, passed, seen)

    @gluon.jit
    def _add(self, block, n, turn, due, passed, seen, before, FROM: gl.constexpr, TO: gl.constexpr):
        """dQ of step n, from the dS of consumers FROM to TO, starts on its way to block `block` of the accumulator.
        Returns whether it was stored, for nothing lay there, and how many blocks were passed on.

        due: what others hear only now may be added to, when what was written there has had the time to reach memory; or
        -1. passed: how many were passed on before. seen: what was seen of the block a while ago. before: how many tiles
        add to it first in a fixed order. A [64, C] part of dQ lies there in the order of the product's registers, so
        that its way through shared memory is 16 bytes wide and free of bank conflicts.
        """
        turns = self.turns
        pipes = self.pipes
        C: gl.constexpr = min(pipes.D, 64)
        LEAVING: gl.constexpr = pipes.exits.shape[1] * 4
        ROWS: gl.constexpr = pipes.BLOCK_M // 64
        COLUMNS: gl.constexpr = (pipes.DIM + C - 1) // C
        PARTS: gl.constexpr = ROWS * COLUMNS
        SENT: gl.constexpr = TO - FROM if self.dbias.STORED else 0  # copies that dbias.send started from dS's slot
        AT_ONCE: gl.constexpr = turns.STEPS > 0 and self.LOADS
        if AT_ONCE:
            passed = turns.pass_on(due, passed)
            turns.await_turn(turns.unit(block), seen, before)
        for part in gl.static_range(PARTS):
            at = (block * ROWS + part // COLUMNS) * (pipes.D // C) + part % COLUMNS
            running = gl.zeros([64, C], gl.float32, accumulator(C))
            for w in gl.static_range(FROM, TO):
                ds = pipes.scores_of(n, w).slice(part // COLUMNS * 64, 64, dim=1)
                if pipes.PANELS > 1:
                    k = pipes.key_panel(turn, w, part % COLUMNS)
                else:
                    k = pipes.key_tile(turn, w).slice(part % COLUMNS * C, C, dim=1)
                running = warpgroup_mma(ds.permute((1, 0)), k, running, use_acc=w > FROM, is_async=True)
            if part == 0 and not AT_ONCE:
                if turns.STEPS > 0:
                    seen = turns.look(turns.unit(block))
                passed = turns.pass_on(due, passed)
            tma.store_wait(pipes.SLOTS - 1 + (SENT if part == 0 else 0))
            dq = warpgroup_mma_wait(0, deps=(running,))
            if part == PARTS - 1:
                if SENT > 0:
                    tma.store_wait(PARTS - 1)
                pipes.scores.release(n)
            else:
                barrier()
            if part == 0:
                is_first = turns.is_first(block, seen, before)
                if turns.STEPS > 0 and not AT_ONCE:
                    turns.await_turn(turns.unit(block), seen, before)
            if LEAVING == C:
                self._leave(dq, at, n * PARTS + part, is_first)
            else:
                left, right = dq.reshape([64, 2, LEAVING]).permute([0, 2, 1]).split()
                self._leave(left, 2 * at, 0, is_first)
                tma.store_wait(pipes.SLOTS - 1)
                barrier()
                self._leave(right, 2 * at + 1, 1, is_first)
        return is_first, passed

    @gluon.jit
    def _leave(self, dq, at, slot, is_first):
        """Part number `at` [64, C] of dQ starts on its way to the accumulator, through a slot known to be empty: it is
        stored where `is_first` says that nothing lies there yet, else added.
        """
        C: gl.constexpr = dq.shape[1]
        tile = self.pipes.exits.index(slot % self.pipes.SLOTS)
        tile.store(dq.reshape([4, 2, 8, C // 8, 4, 2]).permute([3, 0, 2, 4, 1, 5]).reshape([C // 4, 256]))
        fence_async_shared()
        barrier()
        if is_first:
            store(self.dq, [at * (C // 4), 0], tile)
        else:
            reduce_add(self.dq, [at * (C // 4), 0], tile)


@gluon.jit
def reduce_items(reduction, items):
    """Makes dQ of each step from the dS of the consumers whose keys its rows see, and adds it up in memory."""
    sources, pipes, mask, dbias = reduction.sources, reduction.pipes, reduction.mask, reduction.dbias
    n = 0
    passed = 0
    turn = 0
    if reduction.LOADS:
        place, spans = items.take(turn, mask, 4)
    else:
        place, spans = items.wait(turn)
    while place.tile >= 0:
        if reduction.LOADS:
            sources.load_first(pipes, place, spans, turn, n)
            for step in range(1, gl.minimum(steps_of(place, spans), pipes.queries.STAGES)):
                sources.load_step(pipes, place, spans, step, n + step)
        pipes.keys.await_full(pipes.of_keys(turn))
        n, passed = reduction.add_item(n, passed, place, spans)
        mbarrier.arrive(pipes.done.index(turn % 2), count=1)
        if dbias.STORED and (mask.KIND != "none" or mask.RAGGED):
            dbias.blank(pipes, place, spans)
        tma.store_wait(0)
        turn += 1
        if reduction.LOADS:
            place, spans = items.take(turn, mask, 4)
        else:
            place, spans = items.wait(turn)
    reduction.turns.close(passed)
