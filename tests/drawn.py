"""Random cases for property tests: any shape and any combination of features that a call may have."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from flashtile.masks import Causal, Chunked, Documents, Intervals, Mask, Prefix, Window
from flashtile.testing import Case

DIMS = st.sampled_from([1, 2, 7, 8, 16, 17, 24, 32, 33, 40, 64, 72])
AXES = st.sampled_from(["bhqk", "1hqk", "b1qk", "11qk", "bh1k", "bhq1", "b11k", "1h1k", "1111", "hqk", "qk", "k"])


@st.composite
def masks(draw: st.DrawFn, rows: int | None) -> Mask | None:
    """A mask or none; intervals only where the number of rows is one number."""
    side = st.none() | st.integers(-5, 40)
    kinds: list[st.SearchStrategy[Mask | None]] = [
        st.none(),
        st.just(Causal()),
        st.builds(Window, side, side),
        st.builds(Prefix, st.integers(0, 50)),
        st.builds(Chunked, st.integers(1, 40), st.integers(0, 10)),
        st.builds(Documents, st.lists(st.integers(0, 40), max_size=4).map(tuple)),
    ]
    if rows:
        kinds.append(intervals(rows))
    mask = draw(st.one_of(kinds))
    return mask & Causal() if mask is not None and draw(st.booleans()) else mask


@st.composite
def intervals(draw: st.DrawFn, rows: int) -> Mask:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lo, hi = (torch.randint(0, draw(st.integers(1, 80)), (rows,), generator=generator).sort().values for _ in range(2))
    return Intervals(lo, hi)


@st.composite
def cases(draw: st.DrawFn, longest: int, most_heads: int, longest_batch: int = 3) -> Case:
    """Lengths up to `longest`, up to `most_heads` query heads."""
    lengths = st.integers(0, longest)
    kv_heads = draw(st.integers(1, most_heads))
    varlen = draw(st.booleans())
    q_len, k_len = draw(lengths), draw(lengths)
    q_lens = tuple(draw(st.lists(lengths, min_size=1, max_size=longest_batch))) if varlen else None
    bias = draw(st.sampled_from([None, None, "additive", "additive-inf", "boolean"]))
    return Case(
        id=f"drawn-{draw(st.integers(0, 2**31))}",
        why="drawn",
        batch=draw(st.integers(1, longest_batch)),
        q_len=q_len,
        k_len=k_len,
        heads=kv_heads * draw(st.integers(1, most_heads // kv_heads)),
        kv_heads=kv_heads,
        dim=draw(DIMS),
        v_dim=draw(st.none() | DIMS),
        mask=draw(masks(None if varlen else q_len)),
        scale=draw(st.none() | st.sampled_from([0.0, -0.5, 0.3, 2.0])),
        softcap=draw(st.sampled_from([0.0, 0.0, 1.0, 30.0])),
        alibi=draw(st.sampled_from([None, None, "heads", "batch"])),
        bias=bias,
        bias_axes=draw(AXES) if bias else "bhqk",
        bias_float32=draw(st.booleans()),
        sinks=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.7, 1.0])),
        q_lens=q_lens,
        k_lens=tuple(draw(lengths) for _ in q_lens) if q_lens else None,
        trailing=draw(st.integers(0, 3)) if varlen else 0,
        layout=draw(st.sampled_from(["contiguous", "bhnd", "strided", "expanded"])),
        dout_layout=draw(st.sampled_from(["contiguous", "bhnd", "strided", "expanded"])),
        amplitude=draw(st.sampled_from([1.0, 1.0, 10.0])),
        dlse=draw(st.booleans()),
        deterministic=draw(st.booleans()),
    )
