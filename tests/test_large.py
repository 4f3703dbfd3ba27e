"""Sizes that only a large GPU holds: beyond 2**31 elements, beyond 65535 blocks, beyond any quadratic memory.

Results are checked on samples: some heads, or a stretch of rows, are computed again from the definition, in float64 and
in the inputs' own dtype. The error may be twice that of the latter, plus one rounding.
"""

from __future__ import annotations

import fcntl
import gc
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from places import GPU_BACKENDS
from torch import Tensor

import flashtile
from flashtile.dispatch import load
from flashtile.problem import Call
from flashtile.validation import describe

GIB = 2**30
MEMORY = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(MEMORY < 70 * GIB, reason="needs a GPU with 70 GiB of memory"),
]

HALF = torch.float16
Sample = dict[str, Tensor]
Seen = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(autouse=True)
def _one_at_a_time() -> Iterator[None]:
    """Workers share one GPU, and two of these tests do not fit it together."""
    with open(Path(tempfile.gettempdir()) / "flashtile-large.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True, params=GPU_BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with flashtile.use_backend(request.param):
        yield request.param


def normal(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def by_definition(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dtype: torch.dtype, seen: Seen | None) -> Sample:
    """out, lse, dq, dk, dv of one head, tensors (rows, head_dim), a block of rows at a time, every product in dtype."""
    wide = torch.promote_types(dtype, torch.float32)
    q, k, v, dout = (t.to(dtype) for t in (q, k, v, dout))
    scale, block = q.shape[-1] ** -0.5, 2048
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, q.shape[0], block):
        rows = slice(start, start + block)
        scores = (q[rows] @ k.T * scale).to(wide)
        if seen is not None:
            row = torch.arange(start, min(start + block, q.shape[0]), device=q.device)[:, None]
            scores.masked_fill_(~seen(row, torch.arange(k.shape[0], device=q.device)), -torch.inf)
        weights = torch.softmax(scores, -1).to(dtype)
        out = weights @ v
        delta = (dout[rows].to(wide) * out.to(wide)).sum(-1, keepdim=True)
        dscores = (weights.to(wide) * ((dout[rows] @ v.T).to(wide) - delta)).to(dtype)
        dk += dscores.T @ q[rows]
        dv += weights.T @ dout[rows]
        parts.append((out, torch.logsumexp(scores, -1), dscores @ k * scale))
    out, lse, dq = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return {"out": out, "lse": lse, "dq": dq, "dk": (dk * scale).to(dtype), "dv": dv.to(dtype)}


def check_sample(got: Sample, inputs: tuple[Tensor, ...], seen: Seen | None = None, rows: slice = slice(None)) -> None:
    """Raises where a result of one head is farther from float64 than allowed; rows: those that the inputs determine."""
    exact, plain = (by_definition(*inputs, dtype, seen) for dtype in (torch.float64, inputs[0].dtype))
    for name, result in got.items():
        truth = exact[name][rows]
        error, usual = (float((t[rows].double() - truth).abs().max()) for t in (result, plain[name]))
        rounding = torch.finfo(result.dtype).eps / 2 * float(truth.abs().max())
        assert error <= 2 * usual + rounding, (
            f"{name}: error {error:.3g}, plain PyTorch {usual:.3g}, rounding {rounding:.3g}"
        )


def test_a_wrong_sample_is_rejected() -> None:
    inputs = tuple(normal(300, 64) for _ in range(4))
    right = by_definition(*inputs, HALF, None)
    check_sample(right, inputs)
    for name in right:
        wrong = right[name].clone()
        wrong[-1] *= 1.01
        with pytest.raises(AssertionError, match=name):
            check_sample({**right, name: wrong}, inputs)
    with pytest.raises(AssertionError):
        check_sample(right, inputs, causal)


def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """((q, k, v, dout), (out, lse, dq, dk, dv)) of (batch, seqlen, heads, head_dim)."""
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = flashtile.attention(*leaves, return_lse=True)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    return (*(t.detach() for t in leaves), dout), (out.detach(), lse.detach(), *grads)


def causal(row: Tensor, key: Tensor) -> Tensor:
    return key <= row


def check_heads(
    inputs: tuple[Tensor, ...], results: tuple[Tensor, ...], places: list[tuple[int, int]], seen: Seen | None = None
) -> None:
    out, lse, *grads = results
    for b, h in places:
        got = dict(zip(("out", "dq", "dk", "dv"), (t[b, :, h] for t in (out, *grads)), strict=True))
        check_sample({**got, "lse": lse[b, h]}, tuple(t[b, :, h] for t in inputs), seen)


def corners(batch: int, heads: int) -> list[tuple[int, int]]:
    return [(0, 0), (0, heads - 1), (batch // 2, heads // 2), (batch - 1, 0), (batch - 1, heads - 1)]


def test_more_than_2_31_elements() -> None:
    shape = (129, 1024, 256, 64)
    q, k, v = (normal(*shape) for _ in range(3))
    assert q.numel() > 2**31
    check_heads(*run(q, k, v), corners(129, 256))


def test_rows_so_far_apart_that_a_tile_spans_2_31_elements() -> None:
    # Sequence-first memory, (seqlen, batch, heads, head_dim), as torch.nn.MultiheadAttention keeps it.
    q, k, v = (normal(257, 1024, 128, 64).transpose(0, 1) for _ in range(3))
    assert q.stride(1) * 256 >= 2**31
    inputs, results = run(q, k, v)
    assert results[0].stride() == q.stride()
    check_heads(inputs, results, corners(1024, 128))


def test_one_packed_sequence_of_more_than_2_31_elements() -> None:
    length, heads, window, tail = 180_224, 64, 512, 2048
    qkv = normal(1, length, 3, heads, 64).requires_grad_()
    assert qkv.numel() > 2**31
    out, lse, _ = flashtile.flash_attn_qkvpacked_func(qkv, window_size=(window, 0), return_attn_probs=True)
    dout = torch.randn_like(out)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)

    def band(row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & (key >= row - window)

    # The last rows and the keys that they see determine themselves, but for the first `window` of the stretch.
    stretch = slice(length - tail - window, length)
    for h in (0, heads - 1):
        q, k, v = qkv.detach()[0, stretch, :, h].unbind(1)
        dq, dk, dv = dqkv[0, stretch, :, h].unbind(1)
        got = {"out": out[0, stretch, h].detach(), "lse": lse[0, h, stretch].detach(), "dq": dq, "dk": dk, "dv": dv}
        check_sample(got, (q, k, v, dout[0, stretch, h]), band, slice(window, None))


def test_packed_sequences_of_more_than_2_31_elements() -> None:
    sequences, length, heads = 16_640, 1024, 2
    leaves = [normal(sequences * length, heads, 64).requires_grad_() for _ in range(3)]
    assert leaves[0].numel() > 2**31
    starts = torch.arange(sequences + 1, device="cuda", dtype=torch.int32) * length
    out, lse = flashtile.attention_varlen(*leaves, starts, None, length, length, return_lse=True)
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, dout)
    flashtile.check_device_errors()
    inputs, results = (tuple(t.detach() for t in some) for some in ((*leaves, dout), (out, *grads)))
    for index, h in ((0, 0), (sequences // 2, 1), (sequences - 1, 1)):
        rows = slice(index * length, (index + 1) * length)
        got = dict(zip(("out", "dq", "dk", "dv"), (t[rows, h] for t in results), strict=True))
        check_sample({**got, "lse": lse.detach()[h, rows]}, tuple(t[rows, h] for t in inputs))


@pytest.mark.parametrize(("batch", "heads"), [(70_000, 2), (1, 70_000), (300, 300)])
def test_more_than_65535_blocks_along_a_dimension(batch: int, heads: int) -> None:
    check_heads(*run(*(normal(batch, 16, heads, 64) for _ in range(3))), corners(batch, heads))


def test_more_than_65535_tiles_in_one_sequence() -> None:
    length = 2**23 + 1
    q, k, v = normal(1, length, 1, 64), normal(1, 65, 1, 64), normal(1, 65, 1, 64)
    out, lse = flashtile.attention(q, k, v, return_lse=True)
    for rows in (slice(0, 1000), slice(length // 2, length // 2 + 1000), slice(length - 1000, length)):
        queries = q[0, rows, 0]
        check_sample({"out": out[0, rows, 0], "lse": lse[0, 0, rows]}, (queries, k[0, :, 0], v[0, :, 0], queries))


def test_more_than_65535_sequences() -> None:
    lengths = torch.arange(70_000, device="cuda") % 4  # also empty ones
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    q = normal(int(starts[-1]), 2, 64)
    out = flashtile.attention_varlen(q, q, q, starts, None, 3, 3, causal=True)
    flashtile.check_device_errors()
    # The first row of each sequence sees itself alone.
    first = starts[:-1][lengths > 0].long()
    assert torch.equal(out[first], q[first])
    last = q[-3:, 1]
    assert int(lengths[-1]) == 3
    check_sample({"out": out[-3:, 1]}, (last, last, last, torch.zeros_like(last)), causal)


def test_the_published_long_case() -> None:
    query, key, value = (normal(32, 8, 51_200, 64).requires_grad_() for _ in range(3))
    out = flashtile.scaled_dot_product_attention(query, key, value)
    assert out.stride() == query.stride()
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, (query, key, value), dout)
    for b, h in ((0, 0), (31, 7)):
        got = dict(zip(("out", "dq", "dk", "dv"), (t.detach()[b, h] for t in (out, *grads)), strict=True))
        check_sample(got, tuple(t.detach()[b, h] for t in (query, key, value, dout)))


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def extra_memory(attend: Attend, length: int, kv_heads: int, backward: bool) -> int:
    """Bytes at the peak beyond the inputs, the result and the gradients; batch 1, 16 heads of 128, bfloat16."""
    gc.collect()  # what earlier calls left in reference cycles goes now, not while memory is counted
    q = normal(1, length, 16, 128, dtype=torch.bfloat16).requires_grad_()
    k, v = (normal(1, length, kv_heads, 128, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
    dout = torch.randn_like(q)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attend(q, k, v)
    kept = out.nbytes
    if backward:
        kept += sum(grad.nbytes for grad in torch.autograd.grad(out, (q, k, v), dout))
    return torch.cuda.max_memory_allocated() - before - kept


def check_memory_is_linear(attend: Attend, lengths: tuple[int, int], kv_heads: int) -> None:
    """Raises unless memory beyond inputs and results is small and grows with the sequence as they do."""
    shorter, longer = lengths
    for backward, bytes_per_row in ((False, 16 * 4 + 16), (True, 300e6 / 16_384)):
        extra_memory(attend, shorter, kv_heads, backward)  # what is made once is made now
        small, large = (extra_memory(attend, length, kv_heads, backward) for length in lengths)
        assert large <= longer * bytes_per_row, f"{large / 1e6:.1f} MB at {longer} rows, backward {backward}"
        assert large <= longer / shorter * small * 1.1 + 2**20, f"{small / 1e6:.1f} then {large / 1e6:.1f} MB"


@pytest.mark.parametrize("kv_heads", [16, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_linear(kv_heads: int, causal: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention(q, k, v, causal=causal)

    check_memory_is_linear(attend, (8192, 16_384), kv_heads)


def test_quadratic_memory_is_rejected() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return (torch.softmax(q @ k.mT, -1) @ v).transpose(1, 2)

    with pytest.raises(AssertionError, match="MB"):
        check_memory_is_linear(attend, (1024, 2048), 16)


def test_garbage_around_the_tensors_is_neither_read_nor_overwritten(backend: str) -> None:
    length, heads, dim = 1000, 3, 40
    kernels = load(backend)

    def within() -> tuple[Tensor, Tensor]:
        """(a buffer of NaN, the view in its middle): rows before and behind, heads and dims beside."""
        buffer = torch.full((2, length + 64, heads + 2, dim + 24), torch.nan, device="cuda", dtype=HALF)
        return buffer, buffer[:, 32:-32, 1:-1, 8:-16]

    buffers, views = zip(*(within() for _ in range(8)), strict=True)
    q, k, v, dout, out, *grads = views
    for view in (q, k, v, dout):
        view.copy_(torch.randn_like(view))
    call = Call(q, k, v, window_right=0, scale=dim**-0.5)
    _, lse = kernels.forward(describe(call), call, out)
    kernels.backward(describe(call), call, out, lse, dout, None, tuple(grads), False)
    check_heads((q, k, v, dout), (out, lse, *grads), [(0, 0), (1, 2)], causal)
    for buffer, view in zip(buffers, views, strict=True):
        view.fill_(torch.nan)
        assert bool(buffer.isnan().all()), "a kernel wrote beside its results"


def test_garbage_behind_packed_sequences_is_neither_read_nor_left() -> None:
    ends, total = [0, 700, 700, 1637], 2048
    starts = torch.tensor(ends, device="cuda", dtype=torch.int32)
    tensors = [normal(total, 2, 64) for _ in range(4)]
    for tensor in tensors:
        tensor[ends[-1] :] = torch.nan
    leaves = [t.requires_grad_() for t in tensors[:3]]
    out, lse = flashtile.attention_varlen(*leaves, starts, None, 937, 937, causal=True, return_lse=True)
    grads = torch.autograd.grad(out, leaves, tensors[3])
    flashtile.check_device_errors()
    for result in (out, *grads):
        assert not bool(result[ends[-1] :].any())
    assert bool((lse[:, ends[-1] :] == -torch.inf).all())
    results = dict(zip(("out", "dq", "dk", "dv"), (t.detach() for t in (out, *grads)), strict=True))
    for rows in (slice(0, 700), slice(700, 1637)):
        got = {name: t[rows, 1] for name, t in results.items()} | {"lse": lse.detach()[1, rows]}
        check_sample(got, tuple(t.detach()[rows, 1] for t in tensors), causal)
