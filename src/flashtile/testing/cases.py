"""Named calls that every backend must answer: one table for pytest, `flashtile verify` and `flashtile bench`.

CASES are small (a CPU runs them all in seconds); those with `small` suit even Triton's interpreter. `real_cases` holds
sizes for a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashtile.masks import Causal, Chunked, Documents, Full, Intervals, Mask, Prefix, Window

SMALL_LENGTH, SMALL_HEADS = 128, 4


@dataclass(frozen=True)
class Case:
    """One call by shape and features; `inputs.build` makes its tensors.

    why: what this point can catch that its neighbours cannot. dims: qk head dim, v_dim the same where None.
    bias: "additive", "additive-inf" (some entries and one whole row are -inf) or "boolean"; bias_axes: one letter per
    axis of the bias, its name (b, h, q, k) or 1 where it is broadcast, so "1h1k" has shape (1, heads, 1, k_len).
    alibi: "heads" or "batch". q_lens, k_lens: packed sequences (varlen); batch and lengths then follow from them.
    trailing: rows behind the last packed sequence. layout, dout_layout: see `inputs.arrange`.
    amplitude: factor of q, so of the scores. dlse: lse has a gradient too.
    """

    id: str
    why: str
    batch: int = 2
    q_len: int = 64
    k_len: int = 64
    heads: int = 2
    kv_heads: int | None = None
    dim: int = 32
    v_dim: int | None = None
    mask: Mask | None = None
    scale: float | None = None
    softcap: float = 0.0
    alibi: str | None = None
    bias: str | None = None
    bias_axes: str = "bhqk"
    bias_float32: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    q_lens: tuple[int, ...] | None = None
    k_lens: tuple[int, ...] | None = None
    trailing: int = 0
    layout: str = "contiguous"
    dout_layout: str = "contiguous"
    amplitude: float = 1.0
    dlse: bool = False
    deterministic: bool = False

    @property
    def varlen(self) -> bool:
        return self.q_lens is not None

    @property
    def lengths(self) -> tuple[tuple[int, int], ...]:
        """(q_len, k_len) of each sequence."""
        if self.q_lens is None:
            return ((self.q_len, self.k_len),) * self.batch
        return tuple(zip(self.q_lens, self.k_lens or self.q_lens, strict=True))

    @property
    def small(self) -> bool:
        """Small enough for Triton's interpreter, which takes seconds per call."""
        longest = max((max(pair) for pair in self.lengths), default=0)
        return longest <= SMALL_LENGTH and self.heads <= SMALL_HEADS and len(self.lengths) <= SMALL_HEADS

    def __str__(self) -> str:
        return self.id


def _staircase(rows: int) -> Intervals:
    """Groups of eight rows share an interval; every third group sees nothing, between groups that do."""
    group = torch.arange(rows) // 8
    step, place = group // 3, group % 3
    lo, hi = torch.tensor([0, 8, 28]), torch.tensor([20, 28, 28])
    return Intervals(lo[place] + 30 * step, hi[place] + 30 * step)


def _per_batch_prefixes(lengths: tuple[int, ...], rows: int) -> Intervals:
    """Batch entry b sees its first lengths[b] keys only, as padding on the right would have it."""
    hi = torch.tensor(lengths)[:, None].expand(-1, rows).contiguous()
    return Intervals(torch.zeros_like(hi), hi)


LENGTHS = (
    Case("one-query-one-key", "softmax of one value: out is v, dq and dk are 0", q_len=1, k_len=1),
    Case("one-query", "decoding: a tile of one row", q_len=1, k_len=63),
    Case("one-key", "a tile of one column", q_len=63, k_len=1),
    Case("square-64", "exact multiples of every power-of-two tile up to 64", dlse=True),
    Case("square-63", "one short of a tile", q_len=63, k_len=63),
    Case("square-65", "one past a tile: the last tile holds one row", q_len=65, k_len=65),
    Case("odd-111", "no tile divides it", q_len=111, k_len=111, dlse=True),
    Case("odd-257", "several tiles and one row more", q_len=257, k_len=257),
    Case("few-queries", "cross-attention, fewer queries than keys", q_len=17, k_len=111),
    Case("many-queries", "cross-attention, more queries than keys", q_len=111, k_len=17),
    Case("long-keys", "one query tile over many key tiles: the running maximum changes often", q_len=9, k_len=700),
    Case("no-queries", "zero rows", q_len=0, k_len=63),
    Case("no-keys", "zero columns: out 0, lse -inf", q_len=63, k_len=0, dlse=True),
    Case("no-batch", "zero batch", batch=0),
    Case("no-keys-sinks", "only the sink is left: out 0, lse is the sink", q_len=5, k_len=0, sinks=True, dlse=True),
)

HEADS = (
    Case("one-head", "b = h = 1: no other head to be mistaken for", batch=1, heads=1),
    Case("gqa", "two query heads share a key-value head", heads=4, kv_heads=2, dlse=True),
    Case("mqa", "all query heads share one", heads=4, kv_heads=1),
    Case("gqa-of-three", "a group that is no power of two", batch=1, heads=6, kv_heads=2, q_len=33, k_len=70),
    Case(
        "gqa-causal-odd",
        "the common layer of today's models, odd length",
        heads=4,
        kv_heads=2,
        q_len=111,
        k_len=111,
        dim=64,
        mask=Causal(),
    ),
    Case("many-heads", "more heads than any tile of heads", batch=1, heads=13, q_len=20, k_len=20),
)

DIMS = (
    Case("dim-1", "the smallest head", dim=1),
    Case("dim-8", "below the smallest tensor-core depth", dim=8),
    Case("dim-40", "no power of two, a multiple of 8", dim=40, mask=Causal()),
    Case("dim-59", "odd: rows are not aligned to 16 bytes", dim=59, q_len=63, k_len=63),
    Case("dim-64", "the most common", dim=64),
    Case("dim-96", "three quarters of a power of two", dim=96, batch=1),
    Case("dim-111", "odd, in the upper tile", dim=111, batch=1, mask=Causal()),
    Case("dim-128", "the most common of large models", dim=128, batch=1, mask=Causal()),
    Case("dim-192", "between 128 and 256", dim=192, batch=1),
    Case("dim-256", "the largest served", dim=256, batch=1, mask=Causal()),
    Case("v-narrower", "v_dim below the qk dim", dim=64, v_dim=32, dlse=True),
    Case("v-wider", "v_dim above the qk dim", dim=40, v_dim=96, batch=1),
    Case("v-odd", "both odd and unequal", dim=59, v_dim=17, mask=Causal()),
    Case("dim-1-v-256", "the two extremes at once", dim=1, v_dim=256, batch=1),
)

LATENT = (
    Case("mla", "the 192/128 heads of latent attention", dim=192, v_dim=128, batch=1, mask=Causal()),
    Case("mla-full", "several tiles, the last one cut", q_len=150, k_len=410, batch=1, dim=192, v_dim=128, dlse=True),
    Case(
        "mla-narrower", "a third panel that is not full, grouped heads, dropout in both launches",
        heads=4, kv_heads=2, q_len=150, k_len=210, dim=160, v_dim=120, mask=Causal(), sinks=True, dropout_p=0.2,
    ),
    Case(
        "mla-window", "rows that see some of the keys of a tile, in a fixed order",
        q_len=300, k_len=350, dim=136, v_dim=72, mask=Window(90, 20), alibi="heads", deterministic=True,
    ),
    Case("mla-table", "a table instead", q_len=140, k_len=210, dim=192, v_dim=128, mask=Chunked(60, 10)),
    Case(
        "mla-varlen", "items of any number of steps, also none",
        q_lens=(100, 0, 170), k_lens=(90, 40, 330), kv_heads=1, dim=192, v_dim=128, mask=Causal(), dlse=True,
    ),
    Case("mla-softcap", "what latent attention does not have", q_len=140, dim=192, v_dim=128, softcap=5.0),
    Case("mla-bias", "and this", q_len=140, dim=192, v_dim=128, bias="additive"),
)  # fmt: skip

MASKS = (
    Case("full", "the mask object that hides nothing", mask=Full()),
    Case("causal", "the diagonal crosses tiles", mask=Causal(), dlse=True),
    Case("causal-63", "partial diagonal tiles", mask=Causal(), q_len=63, k_len=63),
    Case("causal-few-queries", "bottom-right alignment, diagonal shifted right", mask=Causal(), q_len=17, k_len=111),
    Case("causal-many-queries", "the first rows see nothing", mask=Causal(), q_len=111, k_len=17, dlse=True),
    Case("causal-257", "full, partial and skipped tiles in one row of tiles", mask=Causal(), q_len=257, k_len=257),
    Case("causal-one-query", "the last row sees all keys", mask=Causal(), q_len=1, k_len=111),
    Case("top-left", "PyTorch's alignment is another distance", mask=Window(None, -47), q_len=64, k_len=111),
    Case("strictly-before", "a negative distance: row 0 sees nothing", mask=Window(None, -1)),
    Case("window-left", "a band narrower than a tile", mask=Window(16, 0), q_len=111, k_len=111),
    Case("window-both", "two-sided band", mask=Window(16, 8), q_len=111, k_len=111, dlse=True),
    Case("window-self", "each row sees one key: out is v", mask=Window(0, 0)),
    Case("window-right", "unlimited past, bounded future", mask=Window(None, 5)),
    Case("window-left-only", "bounded past, unlimited future", mask=Window(5, None)),
    Case(
        "window-257",
        "a band of several tiles: tiles on both sides are skipped",
        mask=Window(70, 3),
        q_len=257,
        k_len=257,
    ),
    Case(
        "window-far-half",
        "rows that see nothing of a tile, and then keys in the far half of the next",
        mask=Window(2, 0),
        batch=1,
        dim=128,
        q_len=200,
        k_len=300,
        dlse=True,
    ),
    Case("window-cross", "a band that leaves the keys on both ends", mask=Window(10, 2), q_len=111, k_len=40),
    Case("prefix", "prefix-LM", mask=Prefix(20)),
    Case("prefix-beyond", "a prefix longer than the keys is full attention", mask=Prefix(1000)),
    Case("chunked", "chunks not aligned to tiles", mask=Chunked(24), q_len=111, k_len=111),
    Case("chunked-overlap", "a row's interval starts before its tile", mask=Chunked(16, 6), q_len=80, k_len=80),
    Case("chunked-cross", "chunk borders with shifted positions", mask=Chunked(24) & Causal(), q_len=30, k_len=100),
    Case("documents", "packed documents, one of them empty", mask=Documents((30, 1, 0, 50, 20)), q_len=101, k_len=101),
    Case(
        "documents-causal",
        "the mask of packed pre-training",
        mask=Documents((30, 1, 50, 20)) & Causal(),
        q_len=101,
        k_len=101,
        dlse=True,
    ),
    Case("documents-short", "rows past the last document see nothing", mask=Documents((20, 30)), q_len=64, k_len=64),
    Case(
        "intervals",
        "the family itself, with rows that see nothing between others",
        mask=_staircase(96),
        q_len=96,
        k_len=96,
        dlse=True,
    ),
    Case("intervals-batch", "another table for each batch entry: padded keys", mask=_per_batch_prefixes((0, 40), 64)),
    Case("intervals-causal", "a table cut by a diagonal", mask=_per_batch_prefixes((50, 64), 64) & Causal()),
    Case("prefix-window", "intersection of a table form and a band", mask=Prefix(20) & Window(30, 10)),
    Case("nothing-seen", "no row sees anything: out 0, lse -inf, gradients 0", mask=Window(None, -200), dlse=True),
)

SCORES = (
    Case("scale-negative", "the largest score is the most negative product", scale=-0.3),
    Case("scale-zero", "all scores equal: the mean of v; dq and dk are 0", scale=0.0, mask=Causal()),
    Case("scale-large", "one key takes nearly all weight", scale=4.0),
    Case("softcap", "tanh in the score and its slope in the gradient", softcap=5.0, mask=Causal(), dlse=True),
    Case("softcap-saturated", "scores far beyond the cap: slope near 0", softcap=1.0, amplitude=8.0),
    Case("softcap-negative-scale", "the cap comes after the scale", softcap=2.0, scale=-1.0),
    Case("alibi", "slope per head", alibi="heads", mask=Causal(), q_len=111, k_len=111, heads=4),
    Case("alibi-batch", "slope per batch entry and head, both directions", alibi="batch", dlse=True),
    Case("alibi-cross", "distances with shifted positions", alibi="heads", q_len=17, k_len=111),
    Case("bias", "the full bias, gradient of every entry", bias="additive"),
    Case("bias-heads", "shared by the batch: its gradient sums over it", bias="additive", bias_axes="1hqk", batch=3),
    Case("bias-batch", "shared by the heads", bias="additive", bias_axes="b1qk", heads=3, dlse=True),
    Case("bias-matrix", "two dimensions only", bias="additive", bias_axes="qk", mask=Causal()),
    Case("bias-three-axes", "three dimensions", bias="additive", bias_axes="hqk"),
    Case("bias-keys", "shared by all rows: its gradient sums over them", bias="additive", bias_axes="bh1k"),
    Case("bias-queries", "constant along a row: moves lse, not out", bias="additive", bias_axes="bhq1", dlse=True),
    Case("bias-one", "a single number", bias="additive", bias_axes="1111", dlse=True),
    Case("bias-vector", "one dimension, (k_len,)", bias="additive", bias_axes="k", q_len=33, k_len=70),
    Case("bias-inf", "-inf entries and a row of them", bias="additive-inf", bias_axes="11qk", dlse=True),
    Case("bias-inf-causal", "-inf entries under a mask", bias="additive-inf", mask=Causal(), q_len=63, k_len=63),
    Case("bias-float32", "a bias finer than half-precision inputs", bias="additive", bias_float32=True),
    Case("bias-tiles", "tiles in the middle and at both ends", bias="additive", dim=128, q_len=200, k_len=328),
    Case(
        "bias-hidden-tiles",
        "pairs that nobody sees before and after those seen, in every place of a tile: their gradient is 0",
        bias="additive",
        dim=128,
        q_len=300,
        k_len=712,
        mask=Window(100, 30),
        heads=4,
        kv_heads=2,
    ),
    Case(
        "bias-shared-dropout",
        "the gradient of a shared bias scales with what is kept",
        bias="additive",
        bias_axes="1hqk",
        dim=128,
        q_len=120,
        k_len=136,
        mask=Causal(),
        dropout_p=0.2,
    ),
    Case(
        "bias-heads-repeatable",
        "the sum over heads has an order",
        bias="additive",
        bias_axes="b1qk",
        q_len=72,
        k_len=104,
        dim=64,
        deterministic=True,
    ),
    Case("bias-gqa", "bias per query head, keys shared", bias="additive", heads=4, kv_heads=2, q_len=33, k_len=70),
    Case("boolean", "arbitrary pairs hidden, a row entirely", bias="boolean", dlse=True),
    Case("boolean-padding", "the key-padding mask of batched text", bias="boolean", bias_axes="b11k"),
    Case("boolean-matrix", "two dimensions, with causal", bias="boolean", bias_axes="qk", mask=Causal()),
    Case("sinks", "a logit per head in the denominator", sinks=True, dlse=True),
    Case("sinks-causal", "rows that see nothing but the sink", sinks=True, mask=Causal(), q_len=111, k_len=17),
    Case("sinks-window-gqa", "as in gpt-oss", sinks=True, mask=Window(15, 0), heads=4, kv_heads=1, dim=64),
    Case("logits-large", "scores in the hundreds: only the running maximum keeps them finite", amplitude=100.0),
)

DROPOUT = (
    Case("dropout", "the common rate", dropout_p=0.1),
    Case("dropout-half", "the mask of rows and columns past one tile", dropout_p=0.5, q_len=111, k_len=111, dlse=True),
    Case(
        "dropout-causal-gqa",
        "counter by query head, not by key head",
        dropout_p=0.3,
        mask=Causal(),
        heads=4,
        kv_heads=2,
        q_len=63,
        k_len=63,
    ),
    Case("dropout-high", "few weights stay", dropout_p=0.9),
    Case("dropout-all", "probability 1: out 0, lse as without", dropout_p=1.0, dlse=True),
)

VARLEN = (
    Case("varlen", "unequal lengths", q_lens=(5, 64, 33), k_lens=(5, 64, 33)),
    Case("varlen-cross", "q and k lengths independent", q_lens=(5, 64, 33), k_lens=(70, 3, 33), dlse=True),
    Case(
        "varlen-causal",
        "the diagonal of each sequence is its own",
        q_lens=(17, 50, 64),
        k_lens=(60, 20, 64),
        mask=Causal(),
    ),
    Case("varlen-empty", "no queries, no keys, neither", q_lens=(0, 20, 0, 7), k_lens=(9, 0, 0, 7), dlse=True),
    Case(
        "varlen-all-empty",
        "rows and keys, but no sequence has any: a grid without tiles must clear them all the same",
        q_lens=(0, 0),
        k_lens=(0, 0),
        trailing=2,
        sinks=True,
        dlse=True,
    ),
    Case("varlen-no-keys", "no sequence has a key", q_lens=(3, 4), k_lens=(0, 0)),
    Case(
        "varlen-trailing",
        "rows behind the last sequence: out 0, lse -inf, gradients 0",
        q_lens=(20, 30),
        k_lens=(25, 30),
        trailing=7,
        dlse=True,
    ),
    Case("varlen-one", "a single sequence is dense attention", q_lens=(63,), k_lens=(63,), mask=Causal()),
    Case("varlen-gqa", "grouped heads, long and short", q_lens=(1, 100, 27), k_lens=(1, 100, 27), heads=4, kv_heads=2),
    Case("varlen-decode", "one query each, as a batch of generated tokens", q_lens=(1, 1, 1), k_lens=(33, 1, 100)),
    Case("varlen-window", "a band in each sequence", q_lens=(40, 90), k_lens=(40, 90), mask=Window(10, 3)),
    Case("varlen-chunked", "a table per sequence", q_lens=(40, 9, 70), k_lens=(50, 9, 60), mask=Chunked(16) & Causal()),
    Case("varlen-alibi", "slopes per sequence, positions of each", q_lens=(40, 9), k_lens=(20, 60), alibi="batch"),
    Case("varlen-bias", "bias by positions within a sequence", q_lens=(40, 9), k_lens=(20, 60), bias="additive"),
    Case("varlen-boolean", "hidden pairs by positions", q_lens=(40, 9), k_lens=(40, 9), bias="boolean", bias_axes="qk"),
    Case(
        "varlen-sinks",
        "sinks, with a sequence that has no key",
        q_lens=(40, 9),
        k_lens=(20, 0),
        sinks=True,
        trailing=3,
        dlse=True,
    ),
    Case("varlen-dropout", "counters by position within a sequence", q_lens=(40, 70), k_lens=(40, 70), dropout_p=0.3),
    Case(
        "varlen-many", "a batch with more entries than lanes of a warp", q_lens=(3, 0, 1, 2) * 10, dim=8, mask=Causal()
    ),
)

STRIDES = (
    Case("bhnd", "PyTorch's own layout, read through strides", layout="bhnd", dout_layout="bhnd", mask=Causal()),
    Case("packed", "q, k, v are views of one tensor", layout="packed", mask=Causal()),
    Case("expanded", "keys and values repeated by stride 0", layout="expanded"),
    Case("strided", "head dim with stride 2 and an odd offset", layout="strided", dout_layout="strided", dim=40),
    Case("dout-expanded", "the gradient of out.sum(), all strides 0", dout_layout="expanded"),
    Case(
        "varlen-packed",
        "one packed tensor of packed sequences",
        q_lens=(20, 44),
        layout="packed",
        dout_layout="strided",
    ),
)

COMBINATIONS = (
    Case(
        "everything",
        "all features of a dense call at once",
        heads=4,
        kv_heads=2,
        q_len=70,
        k_len=101,
        dim=40,
        v_dim=24,
        mask=Window(60, 5),
        scale=0.2,
        softcap=3.0,
        alibi="batch",
        bias="additive-inf",
        bias_axes="1hqk",
        sinks=True,
        dropout_p=0.2,
        layout="bhnd",
        dlse=True,
    ),
    Case(
        "everything-table",
        "the same with a table mask and a boolean bias",
        heads=4,
        kv_heads=1,
        q_len=101,
        k_len=70,
        dim=59,
        mask=Chunked(32, 8) & Causal(),
        softcap=4.0,
        alibi="heads",
        bias="boolean",
        bias_axes="b1qk",
        sinks=True,
        dropout_p=0.1,
        dlse=True,
    ),
    Case(
        "everything-varlen",
        "all features of packed sequences at once",
        heads=4,
        kv_heads=2,
        q_lens=(33, 0, 60),
        k_lens=(50, 8, 40),
        trailing=2,
        dim=40,
        v_dim=64,
        mask=Causal(),
        softcap=3.0,
        alibi="batch",
        bias="additive",
        bias_axes="bh1k",
        sinks=True,
        dropout_p=0.2,
        dlse=True,
    ),
    Case(
        "gemma",
        "softcap and window together, wide heads",
        softcap=50.0,
        mask=Window(20, 0),
        dim=256,
        heads=2,
        kv_heads=1,
        batch=1,
    ),
    Case(
        "t5",
        "unscaled scores with a learned bias per head",
        scale=1.0,
        bias="additive",
        bias_axes="1hqk",
        amplitude=0.2,
    ),
    Case("mpt", "ALiBi with dropout", alibi="heads", dropout_p=0.1, mask=Causal(), q_len=63, k_len=63),
    Case(
        "deterministic-gqa",
        "the repeatable backward is another schedule of the same sums",
        deterministic=True,
        heads=4,
        kv_heads=2,
        q_len=111,
        k_len=111,
        mask=Causal(),
        dlse=True,
    ),
)

CASES = (*LENGTHS, *HEADS, *DIMS, *LATENT, *MASKS, *SCORES, *DROPOUT, *VARLEN, *STRIDES, *COMBINATIONS)


def case(name: str) -> Case:
    """The case of that id; KeyError where there is none."""
    return {entry.id: entry for entry in CASES}[name]
