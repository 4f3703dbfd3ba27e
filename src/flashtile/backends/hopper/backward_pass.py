"""Backward on Hopper: what it needs of each row, the gradients in one launch or two, and dQ from its accumulator."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends.hopper import (
    backward_configs,
    backward_epilogue,
    backward_prologue,
    bias_tiles,
    configs,
    descriptors,
    launch,
)
from flashtile.backends.hopper.backward_kernel import backward_kernel
from flashtile.backends.hopper.backward_turns import COUNTERS
from flashtile.backends.hopper.strides import aligned_strides
from flashtile.gpu import arguments, bias_gradient
from flashtile.masks import rows_seeing
from flashtile.problem import Call, Problem

# Heads whose tiles of keys are started side by side under a mask, and what the rows of all may take of the L2 cache.
_SIDE_BY_SIDE = {"both": 4, "keys": 4, "values": 8}
_SECTION_BYTES = 36 * 2**20


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
    if problem.dropout_p == 1.0:  # all weights are dropped: out has no gradient, lse has the one without dropout
        problem, dout = replace(problem, dropout_p=0.0), torch.zeros_like(dout)
    call = arguments.with_dense_bias(call)
    dlse_or_lse = lse if dlse is None else dlse.contiguous()
    dq, dk, dv = grads
    q, k, v = call.q, call.k, call.v
    variant = ("backward", bias_grad, dlse is not None)
    pointed = (out, lse, dq) if dlse is None else (out, lse, dq, dlse_or_lse)
    launches = launch.Launches(problem, call, variant, (q, k, v, dout, dk, dv), pointed)
    if not launches.fit:
        q, k, v, dout = map(descriptors.aligned, (q, k, v, dout))
        dk, dv = map(descriptors.writable, (dk, dv))
    kind = bias_gradient.kind(problem) if bias_grad else "none"
    each, dbias = bias_memory(problem, call, kind)
    rows, accumulated, counters, sums, gathered = _scratch(problem, lse)
    dbias_or_rows = rows if dbias is None else dbias
    before = (out, dout, lse, dlse_or_lse, rows, accumulated, counters, dbias_or_rows, sums)
    passes = backward_configs.launches(problem, dlse is not None)
    errands = [one.errand for one in passes]
    backward_prologue.run(launches, problem, call, before, (kind, dlse is not None, "delta" not in errands))

    first_rows, end_rows = (
        (q, q) if call.lo is None or call.hi is None else rows_seeing(call.lo, call.hi, problem.k_len)
    )
    matrices = bias_boxes(problem, call, dbias if kind in ("tile", "summed") else None)
    if each and dbias is not None and (matrices[1] is None or dbias.dtype == torch.float32):
        dbias.zero_()  # pairs that no row sees are not visited
    boxed = (q, k, v, dout, rows, accumulated, dk, dv, *[q if matrix is None else matrix for matrix in matrices])
    stride_tb = first_rows.stride(0) if problem.table and first_rows.shape[0] > 1 else 0
    ways = ("tile" if each else kind, stride_tb, matrices[0] is not None, matrices[1] is not None)
    tensors = (first_rows, end_rows, dbias_or_rows, counters, rows, out, dout, accumulated, dq, gathered)
    for one in passes:
        plan = partial(prepare, problem, call, boxed, (out, dq), ways, one)
        launches.run(backward_kernel, boxed, tensors, plan, one.name)
    if "dq" not in errands:
        backward_epilogue.run(launches, problem, call, (accumulated, counters, dq, dk, dv))
    if not launches.fit:
        _copy_back(grads, (dq, dk, dv))
    if dbias is not None:
        dbias = bias_gradient.finish_sums(problem, call, kind, dbias)
        if matrices[1] is not None and problem.dropout_p > 0:  # what is kept is scaled once, at the end
            dbias.mul_(1.0 / (1.0 - problem.dropout_p))
    dsinks = None if call.sinks is None else sums.sum((0, 2)).to(call.sinks.dtype)
    return dbias, dsinks


def _scratch(problem: Problem, lse: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory between the kernels: two numbers of each row and two of each block of rows, dq's accumulator, counters of
    items and, where their order counts, of blocks of dq, sums of dsinks where there are some, and of dK and dV between
    two rounds.
    """
    number, columns = _scratch_rows(problem)
    rows = lse.new_empty(3, number)
    accumulated = lse.new_empty(number * columns // 256, 256)
    gathered = rows
    if backward_configs.relays(problem):
        keys = arguments.scratch_keys(problem)
        gathered = lse.new_empty(keys, backward_configs.relay_columns(problem))
        counters = lse.new_zeros(COUNTERS.value + number // 64 + 2 * keys // 64, dtype=torch.int32)
    else:
        blocks = number // 64 if backward_configs.counts_blocks(problem) else 0
        counters = lse.new_empty(COUNTERS.value + blocks, dtype=torch.int32)
    sums = rows
    if problem.sinks:
        sums = lse.new_empty(problem.batch, problem.q_heads, backward_prologue.tiles(problem))
    return rows, accumulated, counters, sums, gathered


@lru_cache(maxsize=4096)  # asked on every call
def _scratch_rows(problem: Problem) -> tuple[int, int]:
    """(Rows of scratch memory, columns of each in dq's accumulator)."""
    return arguments.scratch_rows(problem), backward_configs.accumulator_columns(problem)


def _copy_back(grads: tuple[Tensor, ...], written: tuple[Tensor, ...]) -> None:
    for grad, memory in zip(grads, written, strict=True):
        if memory is not grad:
            grad.copy_(memory)


def bias_memory(problem: Problem, call: Call, kind: str) -> tuple[bool, Tensor | None]:
    """(Whether each head has a gradient of its own, what the kernels fill with the gradient of a bias).

    What heads share is added up in float32 by the kernels, but afterwards, and in a fixed order, where the call asks
    for that or no memory is saved.
    """
    bias = call.bias
    if kind not in ("tile", "summed") or bias is None:
        return False, bias_gradient.allocate(problem, call, kind)
    assert problem.bias_shape is not None
    batch, heads = problem.bias_shape[:2]
    shared = problem.batch * problem.q_heads // (batch * heads)
    if shared == 1 or problem.deterministic or shared * bias.element_size() <= 4:
        shape = (problem.batch, problem.q_heads, problem.q_len, problem.k_len)
        return True, torch.empty(shape, dtype=bias.dtype, device=bias.device)
    return False, torch.zeros(problem.bias_shape, dtype=torch.float32, device=bias.device)


def bias_boxes(problem: Problem, call: Call, dbias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The bias and its gradient as matrices, each None where it does not come or go by TMA."""
    if call.bias is None or problem.varlen:  # tiles at a sequence's end hold more rows and keys than it has
        return None, None
    bias = bias_tiles.matrices(problem, call) if backward_configs.room_for_bias(problem) else None
    # dS lies in shared memory with the softcap's derivative in it; float32 leaves through a slot of dQ of 64 columns.
    narrow = backward_configs.exit_columns(problem) < 64
    if dbias is None or problem.softcap > 0 or (dbias.dtype == torch.float32 and narrow):
        return bias, None
    return bias, bias_tiles.addressable(dbias, problem)


def prepare(
    problem: Problem,
    call: Call,
    boxed: tuple[Tensor, ...],
    pointed: tuple[Tensor, Tensor],
    variant: tuple[Any, ...],
    one: backward_configs.Launch,
) -> launch.Plan:
    """One of the main kernel's launches.

    boxed: q, k, v, dout, rows, dq's accumulator, dk, dv, the bias and dbias; pointed: out and dq; variant: the kind of
    dbias, the stride of a transposed mask's table over the batch, and whether the bias comes and whether dbias goes by
    TMA.
    """
    kind, stride_tb, tiles_in, tiles_out = variant
    config = backward_configs.pick(problem, tiles_in, one.makes)
    tiles = max(1, triton.cdiv(problem.k_len, config.block_n))
    biases, _ = arguments.bias_strides(problem, {"b": call.bias})
    consume, _, load = config.registers
    rounds = _rounds(problem, one, tiles)
    stride_gb, stride_gh = _bias_gradient_strides(problem, kind)
    values: dict[str, Any] = {
        **arguments.scalars(problem, call),
        **arguments.features(problem),
        **biases,
        "BIAS_STEP": biases.pop("stride_bn"),
        "BIAS_TILES": tiles_in,
        "stride_gb": stride_gb,
        "stride_gh": stride_gh,
        "tiles": tiles,
        "COUNTER": [each.name for each in backward_configs.launches(problem)].index(one.name),
        "first_program": one.first_head,
        "padded_k": arguments.padded_keys(problem),
        **rounds,
        "programs": one.heads,
        "section": _section(problem, tiles, one.makes),
        "BLOCK_M": config.block_m,
        "GROUPS": config.groups,
        "DIM": configs.columns(problem.qk_dim),
        "DIM_V": configs.columns(problem.v_dim),
        "STAGES": config.stages,
        "SLOTS": config.slots,
        "CONSUME_REGISTERS": consume,
        "LOAD_REGISTERS": load,
        "GROUPED": problem.group > 1,
        "RAGGED": problem.varlen or problem.k_len % config.block_n > 0,
        "ORDERED": problem.window_right is not None and problem.window_right <= 0,
        "TURN": 0 if one.makes == "values" else backward_configs.turn(problem),  # dV is made in any order
        "CLEARED": backward_configs.cleared(problem),
        "ROTATES": config.rotates,
        "PANELS": 3 if config.panels else 1,
        "MAKES": one.makes,
        **_errands(problem, one, {"o": pointed[0], "y": boxed[3], "x": pointed[1]}),
        "AROUND": backward_configs.goes_around(problem),
        "MIRRORS": one.makes != "values" and backward_configs.mirrors(problem),
        # dV needs no dS, nor what would bound it.
        "PRODUCTS": "narrow" if one.makes == "values" else backward_prologue.products(problem),
        "DBIAS": "boxes" if tiles_out else "none" if kind == "row" else kind,
        "stride_tb": stride_tb,
    }
    options = {"num_warps": 4, "enable_fp_fusion": True}
    items = one.heads * (tiles + (rounds["alone"] * (problem.group - 1) if rounds["RELAYS"] else 0))
    at_once = min(items, launch.multiprocessors(boxed[0].device))
    return launch.Plan(at_once, values, options, partial(_describe, problem, config, tiles_in, tiles_out))


def _errands(problem: Problem, one: backward_configs.Launch, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What the kernel is told of its errands, and of the tensors that they read and write by pointers."""
    strides, align = aligned_strides(problem, tensors)
    return {
        "ERRAND": one.errand,
        "CLEARS": backward_configs.cleared_by(problem) == one.name,
        "COLUMNS": problem.qk_dim,
        "COLUMNS_V": problem.v_dim,
        **{f"{tensor.upper()}_STEP": strides.pop(f"stride_{tensor}d") for tensor in tensors},
        **strides,
        "ALIGN": align,
    }


def _rounds(problem: Problem, one: backward_configs.Launch, tiles: int) -> dict[str, int | bool]:
    """Whether heads come in rounds, how many of a head's tiles take part, and how many key-value heads at once."""
    relays = one.makes != "values" and backward_configs.relays(problem)
    return {"RELAYS": relays, "alone": backward_configs.alone(problem, tiles), "cohort": _cohort(tiles)}


def _cohort(tiles: int) -> int:
    """Key-value heads that go through their rounds together: so many that programs have other tiles to go through while
    the longest ones, twice as long as the mean, wait for each other. Half as many: 8192 4847 us, instead of 3777.
    """
    return 2 * max(1, round(configs.MULTIPROCESSORS / tiles))


def _section(problem: Problem, tiles: int, makes: str) -> int:
    """Key-value heads whose tiles are started side by side."""
    unmasked = arguments.mask_kind(problem) == "none"
    if problem.deterministic and makes != "values":
        return _section_in_order(problem, tiles, _fitting(problem, makes), unmasked)
    if unmasked or 4 * tiles >= 3 * configs.MULTIPROCESSORS:
        return 1  # all tiles are alike, or those of one head occupy the processors
    # The longest tiles of several heads first, and less waits at the end, as long as their rows fit the L2 cache.
    return min(_SIDE_BY_SIDE[makes], _fitting(problem, makes))


def _section_in_order(problem: Problem, tiles: int, fitting: int, unmasked: bool) -> int:
    """The same where the tiles of a head write to dQ one after the other."""
    if unmasked:
        # All tiles of a head meet at its first rows and leave them one after the other: too few for all processors to
        # find work there, unless further heads have some (2048 rows: 415 with two heads, 477 with nine).
        return 1 if tiles >= configs.MULTIPROCESSORS else 1 + -(-configs.MULTIPROCESSORS // tiles)
    if backward_configs.relays(problem):
        # Tiles of 64 keys meet more often.
        return 1 if backward_configs.pick(problem).groups > 1 else max(2, _cohort(tiles) // 2)
    if backward_configs.mirrors(problem):
        return max(1, round(configs.MULTIPROCESSORS / tiles))  # a tile for each program
    if backward_configs.pick(problem).groups == 1:
        # Tiles of 64 keys meet more often: causal, 4096 1949 us with one head, 1892 with two, 1937 with three; 8192,
        # where the rows of two just fit, 3517 with one and 3633 with two.
        return max(1, min(2, fitting // 2))
    return 2 if problem.group > 1 else 1


def _fitting(problem: Problem, makes: str) -> int:
    """Key-value heads whose rows fit the L2 cache: those of Q and dO, and of dQ's accumulator."""
    accumulator = 0 if makes == "values" else 4
    row = problem.qk_dim * (2 + accumulator) + problem.v_dim * 2
    # A program of grouped heads goes through one after the other, so that two of a group are in use.
    return max(1, _SECTION_BYTES // max(1, problem.q_len * row * (2 if problem.group > 1 else 1)))


def _bias_gradient_strides(problem: Problem, kind: str) -> tuple[int, int]:
    """Elements between batches and heads of what the kernel fills for a kind of dbias, 0 where it is broadcast."""
    if kind == "column":
        return problem.q_heads * problem.k_len, problem.k_len
    size = problem.q_len * problem.k_len
    if kind == "summed":
        assert problem.bias_shape is not None
        batch, heads = problem.bias_shape[:2]
        return size * heads if batch > 1 else 0, size if heads > 1 else 0
    return size * problem.q_heads, size


def _describe(
    problem: Problem,
    config: backward_configs.Config,
    tiles_in: bool,
    tiles_out: bool,
    boxed: tuple[Tensor, ...],
) -> tuple[TensorDescriptor, ...]:
    q, k, v, dout, rows, accumulated, dk, dv, bias, dbias = boxed
    dim, v_dim = backward_configs.widths(problem)
    dim = 64 if config.panels else dim
    plain = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    queries = descriptors.rows(q, config.block_m, dim, problem.varlen)
    return (
        queries,
        descriptors.rows(k, 64, dim, problem.varlen),
        descriptors.rows(v, 64, v_dim, problem.varlen),
        descriptors.rows(dout, config.block_m, v_dim, problem.varlen),
        TensorDescriptor.from_tensor(rows, [2, config.block_m], plain),
        TensorDescriptor.from_tensor(accumulated, [backward_configs.exit_columns(problem) // 4, 256], plain),
        descriptors.rows(dk, 64, dim, problem.varlen),
        descriptors.rows(dv, 64, v_dim, problem.varlen),
        bias_tiles.boxes(bias, config.block_m, 64) if tiles_in else queries,
        bias_tiles.boxes(dbias, config.block_m, 64) if tiles_out else queries,
    )
