"""`flashtile explain`: what would happen in one call, without running it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from flashtile import dispatch, masks
from flashtile.api import combine
from flashtile.cli import costs, limits, machine
from flashtile.cli.console import Result, UsageError, integers
from flashtile.cli.explain_view import show
from flashtile.cli.kernels import COMPILED, Kernel, kernels_of, resources_of
from flashtile.cli.options import argument, option
from flashtile.cli.tiles import Tiling
from flashtile.problem import Call, Problem, default_scale
from flashtile.reference import traffic
from flashtile.validation import check

__all__ = ["Options", "run", "show"]

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Options:
    shapes: list[str] = argument(  # noqa: RUF009 - a field, made by dataclasses.field
        "q=batch,seqlen,heads,head_dim, and k= and v= where they differ (v as k, k as q)."
    )
    causal: bool = option(False, "Row i sees keys up to its own position, aligned at the last.")
    window: str | None = option(None, "LEFT,RIGHT keys seen around a row's position; -1 is unlimited.")
    prefix: int | None = option(None, "Prefix-LM: keys that all rows see; the others causally.")
    chunk: str | None = option(None, "SIZE or SIZE,OVERLAP of chunks that see themselves.")
    documents: str | None = option(None, "Lengths of packed documents, comma-separated.")
    softcap: float = option(0.0, "Softcap of the scores.")
    dropout: float = option(0.0, "Dropout probability.")
    alibi: bool = option(False, "With ALiBi slopes.")
    bias: str | None = option(None, "Shape of an additive bias, as BATCH,HEADS,Q,K; 1 where it is broadcast.")
    sinks: bool = option(False, "With a learned sink for each head.")
    dtype: str = option("bf16", "fp16, bf16, fp32 or fp64.")
    device: str | None = option(None, "cuda, cpu, ...; default: the accelerator if there is one.")
    capability: str | None = option(None, "Compute capability of the CUDA device; default: this machine's, else 9.0.")
    backend: str | None = option(None, "hopper, triton, blocked or reference; default: the first that serves the call.")
    compile: str | None = option(None, "Also compile the GPU kernels, for sm_80, sm_90, gfx942, ...; needs no GPU.")
    matmul_tflops: float | None = option(None, "The machine's matrix speed; default: an H100's, of a CPU measured.")
    copy_gbps: float | None = option(None, "The machine's copy speed, read and written; default: as above.")
    fast_memory: int = option(192, "KiB of fast memory that FlashAttention-1 sizes its tiles by (an A100's per SM).")
    fa2_tile: str = option("128,64", "Query rows and keys of FlashAttention-2's tiles.")


def run(options: Options) -> Result:
    """Counts what the call would do; `ok` is false where no backend (or not the one asked for) can serve it."""
    mask = _mask(options)
    problem = _problem(options, mask)
    reasons = dispatch.explain(problem)
    try:
        backend = dispatch.choose(problem, options.backend)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except NotImplementedError:
        backend = None
    lo, hi = traffic.interval_of_rows(_head(problem, mask, 1, 1))
    pairs = _pairs(problem, lo, hi)
    kernels = [] if backend is None else kernels_of(problem, backend)
    needs = {} if options.compile is None else _resources(options.compile, problem, backend, kernels)
    result: Result = {
        "ok": backend is not None,
        "problem": str(problem),
        "backend": backend,
        "backends": reasons,
        "kernels": [
            {**_kernel(problem, kernel, lo, hi), "resources": needs.get(kernel.compiled_as or "")} for kernel in kernels
        ],
        "visible_share": pairs / max(1, problem.q_len * problem.k_len),
        "flops": {},
        "traffic": _traffic(problem, options, mask, kernels),
        "bound": {},
    }
    speeds, source = _limits(options, problem)
    for mode in ("forward", "backward"):
        heads = problem.batch * problem.q_heads
        result["flops"][mode] = costs.products(pairs * heads, problem.qk_dim, problem.v_dim, mode)
        result["bound"][mode] = _bound(result, mode, speeds)
    result["limits"] = {**speeds.as_dict(), "source": source}
    return result


def _resources(target: str, problem: Problem, backend: str | None, kernels: list[Kernel]) -> dict[str, Result]:
    """What each kernel takes of the target."""
    if backend not in COMPILED:
        raise UsageError(f"--compile: got a call that the backend {backend} serves, expected {' or '.join(COMPILED)}")
    if not re.fullmatch(COMPILED["triton"], target):
        raise UsageError(f"--compile: got {target!r}, expected a target such as sm_90 or gfx942")
    if not re.fullmatch(COMPILED[backend], target):
        raise UsageError(f"--compile: got {target!r}, expected {COMPILED[backend]} for the backend {backend}")
    try:
        return resources_of(problem, backend, kernels, target)
    except ValueError as error:
        raise UsageError(f"--compile: {error}") from None


def _shapes(words: list[str]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if name not in ("q", "k", "v") or not equals:
            raise UsageError(f"SHAPES: got {word!r}, expected q=..., k=... or v=...")
        extents = tuple(integers(text, name))
        if len(extents) != 4:
            raise UsageError(f"{name}: got {text!r}, expected batch,seqlen,heads,head_dim")
        shapes[name] = extents
    if "q" not in shapes:
        raise UsageError("SHAPES: got no q, expected q=batch,seqlen,heads,head_dim")
    k = shapes.get("k", shapes["q"])
    return {"q": shapes["q"], "k": k, "v": shapes.get("v", k)}


def _problem(options: Options, mask: masks.Mask | None) -> Problem:
    """The problem, checked as a real call would be, on tensors without memory."""
    if options.dtype not in DTYPES:
        raise UsageError(f"--dtype: got {options.dtype!r}, expected one of {', '.join(DTYPES)}")
    dtype, shapes = DTYPES[options.dtype], _shapes(options.shapes)
    q, k, v = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes.values())
    bias_shape = None if options.bias is None else integers(options.bias, "--bias")
    distances = (None, None) if mask is None else mask.distances()
    call = Call(
        q,
        k,
        v,
        bias=None if bias_shape is None else torch.empty(bias_shape, dtype=dtype, device="meta"),
        alibi_slopes=torch.empty(q.shape[2], device="meta") if options.alibi else None,
        sinks=torch.empty(q.shape[2], device="meta") if options.sinks else None,
        window_left=distances[0] if distances else None,
        window_right=distances[1] if distances else None,
        scale=default_scale(q.shape[-1]),
        softcap=options.softcap,
        dropout_p=options.dropout,
    )
    try:
        problem = check(call)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None
    device = options.device or machine.default_device()
    return replace(problem, device=device, capability=_capability(options, device), table=distances is None)


def _capability(options: Options, device: str) -> tuple[int, int] | None:
    if device != "cuda":
        if options.capability is not None:
            raise UsageError(f"--capability: got {options.capability!r} with the device {device!r}, which has none")
        return None
    if options.capability is None:
        return torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    major, dot, minor = options.capability.partition(".")
    if not (dot and major.isdigit() and minor.isdigit()):
        raise UsageError(f"--capability: got {options.capability!r}, expected two numbers such as 9.0")
    return int(major), int(minor)


def _mask(options: Options) -> masks.Mask | None:
    """All mask options together."""
    window = None if options.window is None else _signed(options.window, "--window", 2)
    parts: list[masks.Mask] = []
    if options.prefix is not None:
        parts.append(masks.Prefix(options.prefix))
    if options.chunk is not None:
        parts.append(_chunked(options.chunk))
    if options.documents is not None:
        parts.append(masks.Documents(tuple(integers(options.documents, "--documents"))))
    try:
        mask = combine(None, options.causal, window)
    except ValueError as error:
        raise UsageError(f"--{error}") from None
    for part in parts:
        mask = part if mask is None else mask & part
    return mask


def _chunked(text: str) -> masks.Chunked:
    words = _signed(text, "--chunk", text.count(",") + 1)
    if len(words) > 2 or words[0] < 1 or words[-1] < 0:
        raise UsageError(f"--chunk: got {text!r}, expected SIZE or SIZE,OVERLAP")
    return masks.Chunked(*words)


def _signed(text: str, name: str, count: int) -> list[int]:
    try:
        values = [int(word) for word in text.split(",")]
    except ValueError:
        values = []
    if len(values) != count:
        raise UsageError(f"{name}: got {text!r}, expected {count} integers separated by commas")
    return values


def _head(problem: Problem, mask: masks.Mask | None, block_m: int, block_n: int) -> traffic.Shape:
    """One head of the problem, as the traffic counts take it."""
    return traffic.Shape(
        problem.q_len, problem.k_len, problem.qk_dim, problem.v_dim, block_m, block_n, mask or masks.Full()
    )


def _pairs(problem: Problem, lo: torch.Tensor, hi: torch.Tensor) -> float:
    """Visible pairs of one head, by the convention of the FlashAttention papers (see `costs.visible_pairs`)."""
    causal_only = (problem.window_left, problem.window_right, problem.table) == (None, 0, False)
    if causal_only and problem.q_len == problem.k_len:
        return problem.q_len * problem.k_len / 2
    return int((hi - lo).clamp(min=0).sum())


def _kernel(problem: Problem, kernel: Kernel, lo: torch.Tensor, hi: torch.Tensor) -> Result:
    """What one kernel launches, and which tiles it visits."""
    tiling = Tiling(lo, hi, problem.k_len, kernel.block_m, kernel.block_n)
    heads = problem.batch * problem.kv_heads if kernel.heads is None else kernel.heads
    if not kernel.shares_keys:
        heads *= problem.group
    counts = tiling.counts()
    steps = -(-problem.k_len // kernel.block_n) if kernel.by_keys else -(-problem.q_len // kernel.block_m)
    items = heads * (steps + kernel.alone * (problem.group - 1))
    return {
        "name": kernel.name,
        "block_m": kernel.block_m,
        "block_n": kernel.block_n,
        "settings": kernel.settings,
        "programs": min(items, kernel.programs or items),
        "tiles": counts,
        "picture": tiling.picture(),
        # A partial tile is computed whole.
        "computed_share": (counts["partial"] + counts["full"]) / max(1, counts["total"]),
    }


def _traffic(problem: Problem, options: Options, mask: masks.Mask | None, kernels: list[Kernel]) -> Result:
    """Bytes between slow and fast memory, all heads: no cache holds anything between tiles."""
    if options.fast_memory < 1:
        raise UsageError(f"--fast-memory: got {options.fast_memory}, expected a positive number of KiB")
    heads, item = problem.batch * problem.q_heads, problem.dtype.itemsize
    fa1 = traffic.fa1_block_sizes(options.fast_memory * 1024 // item, max(problem.qk_dim, problem.v_dim))
    fa2 = integers(options.fa2_tile, "--fa2-tile")
    if len(fa2) != 2:
        raise UsageError(f"--fa2-tile: got {options.fa2_tile!r}, expected query rows and keys")
    one, first, second = (_head(problem, mask, *tile) for tile in ((1, 1), fa1, fa2))
    sizes = {
        "q": problem.batch * problem.q_len * problem.q_heads * problem.qk_dim,
        "k": problem.batch * problem.k_len * problem.kv_heads * problem.qk_dim,
        "v": problem.batch * problem.k_len * problem.kv_heads * problem.v_dim,
        "out": problem.batch * problem.q_len * problem.q_heads * problem.v_dim,
    }
    result: Result = {"tiles": {}}
    for mode in ("forward", "backward"):
        counted = {
            "standard": getattr(traffic, f"standard_{mode}")(one),
            "FlashAttention-1": getattr(traffic, f"fa1_{mode}")(first),
            "FlashAttention-2": getattr(traffic, f"fa2_{mode}")(second),
        }
        result[mode] = {name: heads * count.total * item for name, count in counted.items()}
        result[mode]["this kernel"] = sum(
            _kernel_traffic(problem, kernel, _head(problem, mask, kernel.block_m, kernel.block_n)) * item
            for kernel in kernels
            if kernel.mode == mode
        )
        result[mode]["at least"] = costs.smallest_traffic(sizes, problem.v_dim, problem.dtype, mode)
    lengths = (problem.q_len, problem.k_len)
    for name, tile in (("FlashAttention-1", fa1), ("FlashAttention-2", fa2)):
        result["tiles"][name] = [min(*pair) for pair in zip(tile, lengths, strict=True)]
    return result


def _kernel_traffic(problem: Problem, kernel: Kernel, head: traffic.Shape) -> int:
    """Elements that one kernel moves, all heads."""
    n, m, d, d_v = head[:4]
    kv_heads = problem.batch * problem.kv_heads if kernel.heads is None else kernel.heads
    q_heads = kv_heads * problem.group
    if kernel.dense:
        count = traffic.standard_forward(head) if kernel.mode == "forward" else traffic.standard_backward(head)
        return q_heads * count.total
    if kernel.by_keys:
        # K and V stay in fast memory, Q, dO, lse and delta pass by; dQ too where this kernel adds to it.
        queries = sum(_rows(tiles, head.block_q, n) for tiles in traffic.query_tiles_seeing(head))
        passing = d + d_v + 2 + (2 * d if kernel.adds_dq else 0)
        held = (kv_heads if kernel.shares_keys else q_heads) * 2 * m * (d + d_v)
        # The group's other heads read K, V and the sums before them, and write new ones.
        again = (q_heads - kv_heads) * min(m, kernel.alone * kernel.block_n) * 3 * (d + d_v)
        return q_heads * queries * passing + held + again
    keys = sum(_rows(tiles, head.block_k, m) for tiles in traffic.key_tiles_seen(head))
    own = n * (d + d_v + 1) if kernel.mode == "forward" else n * (2 * d + d_v + 2)
    return q_heads * own + (kv_heads if kernel.shares_keys else q_heads) * keys * (d + d_v)


def _rows(tiles: range, block: int, length: int) -> int:
    return min(tiles.stop * block, length) - tiles.start * block if tiles else 0


def _limits(options: Options, problem: Problem) -> tuple[limits.Limits, str]:
    """The machine's speeds and where they come from."""
    given = (options.matmul_tflops, options.copy_gbps)
    if any(value is not None and value <= 0 for value in given):
        raise UsageError("--matmul-tflops, --copy-gbps: got a value that is not positive")
    if None not in given:
        return limits.Limits(float(given[0] or 0), float(given[1] or 0)), "given"
    if problem.device == "cpu":
        base, source = limits.measure(problem.dtype, "cpu", 0.1), "measured here"
    else:
        base, source = limits.H100, "an H100 SXM, bfloat16"
    mixed = limits.Limits(given[0] or base.matmul_tflops, given[1] or base.copy_gbps)
    return mixed, source if given == (None, None) else f"given, the other of {source}"


def _bound(result: Result, mode: str, speeds: limits.Limits) -> Result:
    """Time that the products and the memory take at the machine's limits, and which of them is longer.

    cache_share: the share of re-read bytes that caches must serve for the products to be the longer part.
    """
    compute = result["flops"][mode] / speeds.matmul_tflops / 1e9
    moved = result["traffic"][mode]
    least, counted = (moved[name] / speeds.copy_gbps / 1e6 for name in ("at least", "this kernel"))
    again = counted - least
    share = min(1.0, max(0.0, (counted - compute) / again)) if again > 0 else 0.0
    return {
        "compute_ms": compute,
        "memory_ms": least,
        "uncached_memory_ms": counted,
        "bound": "compute" if compute >= least else "memory",
        "cache_share": share,
        "flops_per_byte": result["flops"][mode] / max(1, moved["at least"]),
    }
