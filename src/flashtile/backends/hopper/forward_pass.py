"""Forward on Hopper: from a problem to the launch of `forward_kernel`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from flashtile.backends.hopper import bias_tiles, configs, descriptors, launch
from flashtile.backends.hopper.forward_kernel import forward_kernel
from flashtile.gpu import arguments
from flashtile.problem import Call, Problem

# Keys and values of the heads that programs walk through side by side. Twice as many are in use where sections meet,
# and queries and outputs pass through the cache too: full, D=128, 1024: 599 TFLOP/s with 8 MB against 566 with 25.
# Items that differ want a wider section to even them out: a window of 4096 of 8192 keys 722 us with 16 MB, 731 with 8,
# 772 with 25.
_SECTION_BYTES = 8 * 2**20
_WIDE_SECTION_BYTES = 16 * 2**20

_MANY_ROWS = 1024


def forward(problem: Problem, call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out, lse) of an unpacked call."""
    if out is None:
        out = torch.empty(problem.out_shape, dtype=call.q.dtype, device=call.q.device)
    lse = call.q.new_empty(problem.lse_shape, dtype=torch.float32)
    call = arguments.with_dense_bias(call)
    q, k, v, written = call.q, call.k, call.v, out
    launches = launch.Launches(problem, call, ("forward",), (q, k, v, out))
    if not launches.fit:
        q, k, v = map(descriptors.aligned, (q, k, v))
        written = descriptors.writable(out)
    counter = lse.new_zeros(1, dtype=torch.int32) if counted(problem) else lse
    bias = bias_by_tma(problem, call)
    variant = (bias is not None,)
    boxed = (q, k, v, written, q if bias is None else bias)
    launches.run(forward_kernel, boxed, (written, lse, counter), lambda: prepare(problem, call, boxed, variant))
    if written is not out:
        out.copy_(written)
    return out, lse


def bias_by_tma(problem: Problem, call: Call) -> Tensor | None:
    """The bias as (batch, heads, q_len, k_len), None without one, where TMA cannot load it or registers are few."""
    if call.bias is None or not configs.room_for_bias(problem):
        return None
    return bias_tiles.matrices(problem, call)


def _diagonal(problem: Problem) -> int:
    """Keys that the first row sees under a causal mask of any alignment, less one."""
    return problem.k_len - problem.q_len + (problem.window_right or 0)


def _one_tile_on_diagonal(problem: Problem, config: configs.Config) -> bool:
    """True where the diagonal crosses one key tile of those that a consumer walks through together with its rows."""
    rows = 64 if config.strips else 64 * config.groups
    return config.block_n % rows == 0 and _diagonal(problem) % rows == 0


def _even(problem: Problem) -> bool:
    """True where items are nearly alike, or are not shared out beforehand."""
    short_window = problem.window_left is not None and 8 * problem.window_left <= problem.k_len
    return problem.varlen or arguments.mask_kind(problem) == "none" or short_window


def counted(problem: Problem) -> bool:
    """True where programs take their items from a counter in memory: packed sequences, and where few items for each,
    or a mask's left end, leave shares laid out beforehand uneven by more than clearing the counter costs.
    """
    return problem.varlen or (problem.q_len >= _MANY_ROWS and _uneven(problem))


def _uneven(problem: Problem) -> bool:
    wide = max(problem.qk_dim, problem.v_dim) > 128
    return problem.window_left is not None or problem.table or (wide and problem.window_right is not None)


def prepare(problem: Problem, call: Call, boxed: tuple[Tensor, ...], variant: tuple[Any, ...]) -> launch.Plan:
    """The launch of a problem; boxed: q, k, v, out and the bias; variant: whether that is loaded by TMA."""
    config = configs.forward(problem, variant[0])
    assert config is not None, problem
    tiles = max(1, triton.cdiv(problem.q_len, 64 * config.groups))  # one, so that rows of no sequence are cleared
    programs = (problem.batch + problem.varlen) * problem.q_heads
    out = boxed[3]
    biases, _ = arguments.bias_strides(problem, {"b": call.bias})
    falling = arguments.mask_kind(problem) == "band" and problem.window_left is None and not problem.varlen
    taken = counted(problem)
    paired = falling and programs > 32 and not taken
    room = _SECTION_BYTES if paired or _even(problem) else _WIDE_SECTION_BYTES
    section = arguments.section(problem, problem.k_len, problem.group, room)
    if falling and not paired and not taken:
        # Few heads stream their keys and values side by side well enough; the order forth and back is the finer one.
        section = max(section, programs)
    values: dict[str, Any] = {
        **arguments.scalars(problem, call),
        **arguments.features(problem),
        **biases,
        "stride_om": out.stride(-3),
        "stride_oh": out.stride(-2),
        "BIAS_STEP": biases.pop("stride_bn"),
        "BIAS_TILES": variant[0],
        "tiles": tiles,
        "programs": programs,
        "section": section,
        "PAIRED": paired,
        "COUNTED": taken,
        "BATCH_FIRST": variant[0] and not problem.varlen and boxed[4].shape[0] < problem.batch,
        "GROUPS": config.groups,
        "BLOCK_N": config.block_n,
        "STAGES": config.stages,
        "SHARED": config.shared and (config.panels or configs.width(problem.qk_dim) == configs.width(problem.v_dim)),
        # Where every row sees all keys and they fill whole tiles, nothing is ever masked.
        "RAGGED": problem.varlen or arguments.mask_kind(problem) != "none" or problem.k_len % config.block_n > 0,
        "SINGLE": falling and _one_tile_on_diagonal(problem, config),
        "QUERY_STAGES": config.query_stages,
        "PIECES": config.pieces,
        "STRIPS": config.strips,
        "PANELS": triton.cdiv(problem.qk_dim, 64) if config.panels else 1,
        "CONSUMER_REGISTERS": config.registers[0],
        "PRODUCER_REGISTERS": config.registers[1],
        "DIM": configs.columns(problem.qk_dim),
        "DIM_V": problem.v_dim,
        "SINKS": problem.sinks,
        "FOLD": not arguments.changes_scores(problem) and problem.scale > 0,
    }
    at_once = min(tiles * programs, launch.multiprocessors(out.device))
    return launch.Plan(at_once, values, {"num_warps": 4}, partial(_describe, problem, config, variant[0]))


def _describe(
    problem: Problem, config: configs.Config, biased: bool, boxed: tuple[Tensor, ...]
) -> tuple[TensorDescriptor, ...]:
    q, k, v, out, bias = boxed
    dim, v_dim = configs.width(problem.qk_dim), configs.width(problem.v_dim)
    out_dim = v_dim
    if config.panels:
        dim = out_dim = 64
    queries = descriptors.rows(q, 64, dim, problem.varlen)
    return (
        queries,
        descriptors.rows(k, config.block_n, dim, problem.varlen),
        descriptors.rows(v, config.block_n, v_dim, problem.varlen),
        descriptors.rows(out, 64, out_dim, problem.varlen),
        bias_tiles.boxes(bias, 64, config.block_n) if biased else queries,
    )
