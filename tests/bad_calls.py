"""One row of `BAD` is one bad call of a public function: the exception it must raise and what the message must say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flashtile
from flashtile import masks

INF, NAN = float("inf"), float("nan")


class Bad(NamedTuple):
    name: str
    call: Callable[[], object]
    kind: type[Exception]
    words: tuple[str, ...]  # argument, got, expected: all must be in the message


def bad_value(name: str, call: Callable[[], object], *words: str) -> Bad:
    return Bad(name, call, ValueError, words)


def bad_type(name: str, call: Callable[[], object], *words: str) -> Bad:
    return Bad(name, call, TypeError, words)


def unable(name: str, call: Callable[[], object], *words: str) -> Bad:
    return Bad(name, call, NotImplementedError, words)


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = False) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device, requires_grad=grad)


def starts(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def dense(**changes: Any) -> Callable[[], object]:
    """flashtile.attention, four query heads over two key-value heads, with some arguments changed."""
    return lambda: flashtile.attention(**_tensors(changes))


def _tensors(changes: dict[str, Any]) -> dict[str, Any]:
    return {"q": zeros(2, 5, 4, 8), "k": zeros(2, 7, 2, 8), "v": zeros(2, 7, 2, 8), **changes}


def packed(**changes: Any) -> Callable[[], object]:
    """flashtile.attention_varlen of sequences with 2 and 4 rows."""
    return lambda: flashtile.attention_varlen(**{**_varlen(changes), "max_seqlen_k": 4, **changes})


def _varlen(changes: dict[str, Any]) -> dict[str, Any]:
    tensors = {"q": zeros(6, 4, 8), "k": zeros(6, 2, 8), "v": zeros(6, 2, 8)}
    return {**tensors, "cu_seqlens_q": starts(0, 2, 6), "cu_seqlens_k": starts(0, 2, 6), "max_seqlen_q": 4, **changes}


def sdpa(**changes: Any) -> Callable[[], object]:
    tensors = {"query": zeros(2, 4, 5, 8), "key": zeros(2, 4, 7, 8), "value": zeros(2, 4, 7, 8)}
    return lambda: flashtile.scaled_dot_product_attention(**{**tensors, **changes})


def flash(**changes: Any) -> Callable[[], object]:
    return lambda: flashtile.flash_attn_func(**_tensors(changes))


def flash_varlen(**changes: Any) -> Callable[[], object]:
    return lambda: flashtile.flash_attn_varlen_func(**{**_varlen(changes), "max_seqlen_k": 4, **changes})


def flash_qkv(**changes: Any) -> Callable[[], object]:
    return lambda: flashtile.flash_attn_qkvpacked_func(**{"qkv": zeros(2, 5, 3, 4, 8), **changes})


def flash_kv(**changes: Any) -> Callable[[], object]:
    return lambda: flashtile.flash_attn_kvpacked_func(**{"q": zeros(2, 5, 4, 8), "kv": zeros(2, 7, 2, 2, 8), **changes})


def flash_varlen_qkv(**changes: Any) -> Callable[[], object]:
    arguments = {"qkv": zeros(6, 3, 4, 8), "cu_seqlens": starts(0, 2, 6), "max_seqlen": 4}
    return lambda: flashtile.flash_attn_varlen_qkvpacked_func(**{**arguments, **changes})


def flash_varlen_kv(**changes: Any) -> Callable[[], object]:
    arguments = {**_varlen({}), "kv": zeros(6, 2, 2, 8), "max_seqlen_k": 4}
    del arguments["k"], arguments["v"]
    return lambda: flashtile.flash_attn_varlen_kvpacked_func(**{**arguments, **changes})


def merge(outs: Any, lses: Any) -> Callable[[], object]:
    return lambda: flashtile.merge_states(outs, lses)


def interleaved(shift: int) -> Callable[[], object]:
    """out= as a view of q's own buffer; with a shift below q's rows the two share elements."""
    buffer = torch.zeros(2 * 5 * 4 * 16)
    q, out = (torch.as_strided(buffer, (2, 5, 4, 8), (320, 64, 16, 1), start) for start in (0, shift))
    return dense(q=q, out=out)


def within_backend(name: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with flashtile.use_backend(name):
            return call()

    return run


TENSOR = "expected a torch.Tensor"
HALF = torch.float16

TENSORS = [
    bad_type("q-list", dense(q=[[1.0]]), "q: got list", TENSOR),
    bad_type("k-none", dense(k=None), "k: got NoneType", TENSOR),
    bad_type("v-number", dense(v=3), "v: got int", TENSOR),
    bad_type("q-sparse", dense(q=zeros(2, 5, 4, 8).to_sparse()), "q: got layout", "expected torch.strided"),
    bad_value("q-rank-2", dense(q=zeros(5, 8)), "q: got 2 dim", "(5, 8)", "expected 4: (batch, seqlen, heads"),
    bad_value("q-scalar", dense(q=zeros()), "q: got 0 dimensions", "expected 4"),
    bad_value("k-rank-3", dense(k=zeros(2, 7, 8)), "k: got 3 dimensions", "(2, 7, 8)", "expected 4"),
    bad_value("v-rank-5", dense(v=zeros(1, 2, 7, 2, 8)), "v: got 5 dimensions", "expected 4"),
    bad_type("q-int", dense(q=zeros(2, 5, 4, 8, dtype=torch.int32)), "q: got torch.int32", "expected float16"),
    bad_type("q-complex", dense(q=zeros(2, 5, 4, 8, dtype=torch.complex64)), "q: got torch.complex64"),
    bad_type("k-dtype", dense(k=zeros(2, 7, 2, 8, dtype=HALF)), "k: got torch.float16", "torch.float32, the"),
    bad_type("v-dtype", dense(v=zeros(2, 7, 2, 8, dtype=torch.float64)), "v: got torch.float64", "float32"),
    bad_value("k-device", dense(k=zeros(2, 7, 2, 8, device="meta")), "k: got device meta", "expected cpu"),
    bad_value("q-device", dense(q=zeros(2, 5, 4, 8, device="meta")), "k: got device cpu", "expected meta"),
    bad_value("k-batch", dense(k=zeros(3, 7, 2, 8), v=zeros(3, 7, 2, 8)), "k: got batch 3", "expected 2"),
    bad_value("v-length", dense(v=zeros(2, 6, 2, 8)), "v: got shape (2, 6, 2, 8)", "expected (2, 7, 2)"),
    bad_value("v-heads", dense(v=zeros(2, 7, 4, 8)), "v: got shape (2, 7, 4, 8)", "expected (2, 7, 2)"),
    bad_value("heads", dense(q=zeros(2, 5, 3, 8)), "k: got 2 heads", "expected a divisor of 3"),
    bad_value(
        "kv-heads-0", dense(k=zeros(2, 7, 0, 8), v=zeros(2, 7, 0, 8)), "k: got 0 heads", "expected a divisor of 4"
    ),
    bad_value("k-head-dim", dense(k=zeros(2, 7, 2, 9)), "k: got head_dim 9", "expected 8"),
    bad_value("head-dim-0", dense(q=zeros(2, 5, 4, 0), k=zeros(2, 7, 2, 0)), "q: got head_dim 0", "expected 1 to 256"),
    bad_value(
        "head-dim-257", dense(q=zeros(2, 5, 4, 257), k=zeros(2, 7, 2, 257)), "q: got head_dim 257", "expected 1 to 256"
    ),
    bad_value("v-dim-0", dense(v=zeros(2, 7, 2, 0)), "v: got head_dim 0", "expected 1 to 256"),
    bad_value("v-dim-300", dense(v=zeros(2, 7, 2, 300)), "v: got head_dim 300", "expected 1 to 256"),
]

NUMBERS = [
    bad_value("dropout-negative", dense(dropout_p=-0.1), "dropout_p: got -0.1", "expected a probability"),
    bad_value("dropout-2", dense(dropout_p=2), "dropout_p: got 2.0", "from 0 to 1"),
    bad_value("dropout-nan", dense(dropout_p=NAN), "dropout_p: got nan", "expected a finite number"),
    bad_type("dropout-string", dense(dropout_p="0.1"), "dropout_p: got str", "expected a number"),
    bad_type("dropout-bool", dense(dropout_p=True), "dropout_p: got bool", "expected a number"),
    bad_type("dropout-tensor", dense(dropout_p=torch.tensor(0.1)), "dropout_p: got Tensor", "expected a num"),
    bad_value("scale-nan", dense(scale=NAN), "scale: got nan", "expected a finite number"),
    bad_value("scale-inf", dense(scale=-INF), "scale: got -inf", "expected a finite number"),
    bad_type("scale-list", dense(scale=[1.0]), "scale: got list", "expected a number"),
    bad_type("scale-complex", dense(scale=1j), "scale: got complex", "expected a number"),
    bad_value("softcap-negative", dense(softcap=-1.0), "softcap: got -1.0", "expected 0 (off) or a positive"),
    bad_value("softcap-inf", dense(softcap=INF), "softcap: got inf", "expected a finite number"),
    bad_type("softcap-none", dense(softcap=None), "softcap: got NoneType", "expected a number"),
    bad_type("deterministic-int", dense(deterministic=1), "deterministic: got int", "expected a bool"),
]

MASKS = [
    bad_type("mask-tensor", dense(mask=zeros(5, 7)), "mask: got Tensor", "expected a mask of flashtile.masks"),
    bad_type("mask-class", dense(mask=masks.Causal), "mask: got type", "expected a mask"),
    bad_type("mask-and", lambda: masks.Causal() & 3, "&", "'Causal' and 'int'"),
    bad_type("causal-int", dense(causal=1), "causal: got int", "expected a bool"),
    bad_type("window-int", dense(window=3), "window: got int", "expected a pair (left, right)"),
    bad_value("window-three", dense(window=(1, 2, 3)), "window: got 3 values", "expected a pair"),
    bad_type("window-float", dense(window=(1.5, 0)), "window: got float 1.5", "expected ints or None"),
    bad_type("window-bool", dense(window=(True, 0)), "window: got bool True", "expected ints or None"),
    bad_type("window-string", dense(window=("a", "b")), "window: got str 'a'", "expected ints or None"),
    bad_value("window-minus-2", dense(window=(-2, 0)), "window: got (-2, 0)", "expected 0 or more keys"),
    bad_type("window-2d", dense(window=torch.zeros(2, 2).int()), "window: got list [0, 0]", "expected ints"),
    bad_type("band-float", lambda: masks.Window(1.0), "Window left: got float", "expected an int"),
    bad_value("prefix-minus", lambda: masks.Prefix(-1), "Prefix length: got -1", "expected at least 0"),
    bad_type("prefix-string", lambda: masks.Prefix("7"), "Prefix length: got str", "expected an int"),
    bad_value("chunk-0", lambda: masks.Chunked(0), "Chunked size: got 0", "expected at least 1"),
    bad_value("chunk-overlap", lambda: masks.Chunked(4, -1), "Chunked overlap: got -1", "expected at least 0"),
    bad_type("documents-int", lambda: masks.Documents(3), "Documents lengths: got int", "expected a tuple"),
    bad_value("documents-minus", lambda: masks.Documents((3, -1)), "Documents lengths: got -1", "at least 0"),
    bad_value(
        "intervals-decreasing",
        lambda: masks.Intervals(starts(0, 2, 1), starts(3, 3, 3)),
        "Intervals lo: got a bound that decreases",
        "expected non-decreasing",
    ),
    bad_type(
        "intervals-dtype",
        lambda: masks.Intervals(zeros(3), starts(3, 3, 3)),
        "Intervals lo: got torch.float32",
        "expected an int32 or int64",
    ),
    bad_value(
        "intervals-shapes",
        lambda: masks.Intervals(starts(0, 0, 0), starts(3, 3)),
        "Intervals hi: got shape (2,)",
        "expected (3,)",
    ),
    bad_value(
        "intervals-rank",
        lambda: masks.Intervals(zeros(1, 1, 3).int(), zeros(1, 1, 3).int()),
        "Intervals lo: got 3 dimensions",
        "expected (q_len,) or (batch, q_len)",
    ),
    bad_value(
        "intervals-rows",
        dense(mask=masks.Intervals(starts(0, 0, 0), starts(3, 3, 3))),
        "mask: got intervals for 3 rows",
        "expected 5",
    ),
    bad_value(
        "intervals-batch",
        dense(mask=masks.Intervals(zeros(3, 5).int(), zeros(3, 5).int())),
        "mask lo: got shape (3, 5)",
        "expected (1 or 2, 5)",
    ),
]

EXTRAS = [
    bad_type("bias-list", dense(bias=[0.0]), "bias: got list", TENSOR),
    bad_value("bias-shape", dense(bias=zeros(5, 6)), "bias: got shape (5, 6)", "= (2, 4, 5, 7)"),
    bad_value("bias-heads", dense(bias=zeros(2, 5, 7)), "bias: got shape (2, 5, 7)", "broadcastable to"),
    bad_value("bias-rank", dense(bias=zeros(1, 2, 4, 5, 7)), "bias: got shape (1, 2,", "broadcastable to"),
    bad_type("bias-int", dense(bias=zeros(5, 7).int()), "bias: got torch.int32", "expected bool, float32"),
    bad_type("bias-float64", dense(bias=zeros(5, 7).double()), "bias: got torch.float64", "expected bool"),
    bad_value("bias-device", dense(bias=zeros(5, 7, device="meta")), "bias: got device meta", "expected cpu"),
    bad_value("alibi-shape", dense(alibi_slopes=zeros(3)), "alibi_slopes: got shape (3,)", "(4,) or (2, 4)"),
    bad_type("alibi-int", dense(alibi_slopes=zeros(4).int()), "alibi_slopes: got torch.int32", "floating"),
    bad_value(
        "alibi-grad",
        dense(alibi_slopes=zeros(4, grad=True)),
        "alibi_slopes: got a tensor that requires grad",
        "expected one that does not",
    ),
    bad_type("alibi-number", dense(alibi_slopes=0.5), "alibi_slopes: got float", TENSOR),
    bad_value("sinks-shape", dense(sinks=zeros(2)), "sinks: got shape (2,)", "expected (4,)"),
    bad_type("sinks-bool", dense(sinks=zeros(4).bool()), "sinks: got torch.bool", "expected a floating-point"),
    bad_value("sinks-device", dense(sinks=zeros(4, device="meta")), "sinks: got device meta", "expected cpu"),
]

OUT = [
    bad_type("out-list", dense(out=[]), "out: got list", TENSOR),
    bad_value("out-shape", dense(out=zeros(2, 5, 2, 8)), "out: got shape (2, 5, 2, 8)", "(2, 5, 4, 8)"),
    bad_type("out-dtype", dense(out=zeros(2, 5, 4, 8, dtype=HALF)), "out: got torch.float16", "torch.float32"),
    bad_value("out-device", dense(out=zeros(2, 5, 4, 8, device="meta")), "out: got device meta", "cpu"),
    bad_value("out-of-grad", dense(q=zeros(2, 5, 4, 8, grad=True), out=zeros(2, 5, 4, 8)), "out: ", "no_grad"),
    bad_value("out-grad", dense(out=zeros(2, 5, 4, 8, grad=True)), "out: got", "expected no gradient"),
    bad_value("out-is-q", interleaved(0), "out: got memory that overlaps q", "expected memory of its own"),
    bad_value("out-crosses-q", interleaved(7), "out: got memory that overlaps q", "expected memory of its own"),
    bad_value("out-expanded", dense(out=zeros(1, 5, 4, 8).expand(2, -1, -1, -1)), "out: got strides (0,"),
    bad_value(
        "out-one-head",
        dense(q=zeros(2, 5, 8), k=zeros(2, 7, 8), v=zeros(2, 7, 8), out=zeros(2, 5)),
        "out: got shape (2, 5)",
    ),
    bad_value("out-varlen", packed(out=zeros(5, 4, 8)), "out: got shape (5, 4, 8)", "expected (6, 4, 8)"),
]

BACKEND = [
    bad_value("backend-unknown", dense(backend="cudnn"), "backend: got 'cudnn'", "'triton'", "'reference'"),
    bad_value("backend-int", dense(backend=3), "backend: got 3", "expected one of 'hopper', 'triton'"),
    bad_value("backend-unknown-empty", dense(q=zeros(2, 0, 4, 8), backend="x"), "backend: got 'x'", "expected"),
    bad_value("use-backend", within_backend("flash", dense()), "backend: got 'flash'", "expected one of"),
    unable(
        "backend-cannot",
        dense(**{name: t.double() for name, t in _tensors({}).items()}, backend="triton"),
        "backend 'triton' cannot serve",
        "b2 q5 k7 h4/2 d8 float64 cpu",
        "float64 has no",
    ),
    unable(
        "use-backend-cannot",
        within_backend("triton", dense(**{name: t.double() for name, t in _tensors({}).items()})),
        "backend 'triton' cannot serve",
        "float64 has no",
    ),
    bad_value("device", lambda: flashtile.check_device_errors("moon"), "device: got 'moon'", "expected a dev"),
]

VARLEN = [
    bad_type("cu-list", packed(cu_seqlens_q=[0, 2, 6]), "cu_seqlens_q: got list", TENSOR),
    bad_type("cu-k-list", packed(cu_seqlens_k=[0, 2, 6]), "cu_seqlens_k: got list", TENSOR),
    bad_value("cu-rank", packed(q=zeros(2, 3, 4, 8)), "q: got 4 dimensions", "expected 3: (total, heads"),
    bad_type(
        "cu-dtype",
        packed(cu_seqlens_q=starts(0, 2, 6, dtype=torch.int64)),
        "cu_seqlens_q: got torch.int64",
        "expected torch.int32",
    ),
    bad_type("cu-k-dtype", packed(cu_seqlens_k=zeros(3)), "cu_seqlens_k: got torch.float32", "torch.int32"),
    bad_value("cu-2d", packed(cu_seqlens_q=zeros(1, 3).int()), "cu_seqlens_q: got shape (1, 3)", "(batch + 1"),
    bad_value("cu-empty", packed(cu_seqlens_q=zeros(0).int()), "cu_seqlens_q: got shape (0,)", "(batch + 1,)"),
    bad_value("cu-lengths", packed(cu_seqlens_k=starts(0, 6)), "cu_seqlens_k: got length 2", "expected 3"),
    bad_value("cu-device", packed(cu_seqlens_q=zeros(3, device="meta").int()), "cu_seqlens_q: got device meta"),
    bad_value("cu-start", packed(cu_seqlens_q=starts(1, 2, 6)), "cu_seqlens_q: got first value 1", "expected 0"),
    bad_value(
        "cu-decreasing",
        packed(cu_seqlens_q=starts(0, 4, 2)),
        "cu_seqlens_q: got 4 then 2 at index 2",
        "expected non-decreasing",
    ),
    bad_value("cu-k-decreasing", packed(cu_seqlens_k=starts(0, 4, 3)), "cu_seqlens_k: got 4 then 3", "expected"),
    bad_value(
        "cu-beyond", packed(cu_seqlens_k=starts(0, 3, 7)), "cu_seqlens_k: got last value 7", "expected at most 6"
    ),
    bad_value("max-q-small", packed(max_seqlen_q=3), "cu_seqlens_q: got a sequence of 4", "at most 3, max_seq"),
    bad_value("max-k-small", packed(max_seqlen_k=1), "cu_seqlens_k: got a sequence of", "at most 1, max_seqle"),
    bad_value("max-negative", packed(max_seqlen_q=-4), "max_seqlen_q: got -4", "expected an int >= 0"),
    bad_type("max-float", packed(max_seqlen_q=4.0), "max_seqlen_q: got float", "expected an int"),
    bad_type("max-k-bool", packed(max_seqlen_k=True), "max_seqlen_k: got bool", "expected an int"),
    bad_type("max-string-masked", packed(max_seqlen_q="4", mask=masks.Prefix(2)), "max_seqlen_q: got str"),
    bad_type("cu-dtype-masked", packed(cu_seqlens_q=zeros(3), mask=masks.Prefix(2)), "cu_seqlens_q: got torch.f"),
    bad_value("varlen-v-length", packed(v=zeros(5, 2, 8)), "v: got shape (5, 2, 8)", "expected (6, 2)"),
    bad_value("varlen-bias", packed(bias=zeros(6, 6)), "bias: got shape (6, 6)", "= (2, 4, 4, 4)"),
    bad_value("varlen-alibi", packed(alibi_slopes=zeros(3, 4)), "alibi_slopes: got shape (3, 4)", "(2, 4)"),
]

MERGE = [
    bad_type("merge-tensor", merge(zeros(2, 5, 4, 8), []), "outs: got Tensor", "expected a list or tuple"),
    bad_type("merge-part", merge([zeros(2, 5, 4, 8)], [None]), "lses: got list", "expected a list or tuple of"),
    bad_value("merge-none", merge([], []), "lses: got 0 parts", "expected 1"),
    bad_value("merge-count", merge([zeros(2, 5, 4, 8)] * 2, [zeros(2, 4, 5)]), "lses: got 1 parts", "expected 2"),
    bad_value(
        "merge-shapes",
        merge([zeros(2, 5, 4, 8), zeros(2, 6, 4, 8)], [zeros(2, 4, 5)] * 2),
        "outs[1]: got shape (2, 6, 4, 8)",
        "expected (2, 5, 4, 8)",
    ),
    bad_value("merge-rank", merge([zeros(5, 8)], [zeros(5)]), "outs[0]: got shape (5, 8)", "expected"),
    bad_value(
        "merge-lse", merge([zeros(2, 5, 4, 8)], [zeros(2, 5, 4)]), "lses[0]: got shape (2, 5, 4)", "expected (2, 4, 5)"
    ),
    bad_type("merge-int", merge([zeros(2, 5, 4, 8)], [zeros(2, 4, 5).int()]), "lses[0]: got torch.int32", "expec"),
    bad_value(
        "merge-device",
        merge([zeros(2, 5, 4, 8)], [zeros(2, 4, 5, device="meta")]),
        "lses[0]: got device meta",
        "expected cpu",
    ),
]

SDPA = [
    bad_type("sdpa-query", sdpa(query=None), "query: got NoneType", TENSOR),
    bad_value("sdpa-rank", sdpa(key=zeros(8)), "key: got shape (8,)", "expected at least 2 dimensions"),
    bad_value(
        "sdpa-causal-and-mask",
        sdpa(is_causal=True, attn_mask=zeros(5, 7)),
        "attn_mask: got a mask together with is_causal=True",
        "expected one or the other",
    ),
    bad_type("sdpa-causal-int", sdpa(is_causal=1), "is_causal: got int", "expected a bool"),
    bad_type("sdpa-gqa-string", sdpa(enable_gqa="yes"), "enable_gqa: got str", "expected a bool"),
    bad_value(
        "sdpa-heads",
        sdpa(key=zeros(2, 2, 7, 8), value=zeros(2, 2, 7, 8)),
        "key: got shape (2, 2, 7, 8)",
        "broadcast with query (2, 4, 5, 8)",
    ),
    bad_value(
        "sdpa-gqa-divisor",
        sdpa(key=zeros(2, 3, 7, 8), value=zeros(2, 3, 7, 8), enable_gqa=True),
        "key: got 3 heads",
        "expected a divisor of 4, the heads of query",
    ),
    bad_value(
        "sdpa-gqa-value",
        sdpa(key=zeros(2, 2, 7, 8), enable_gqa=True),
        "value: got 4 heads",
        "expected 2, the heads of key",
    ),
    bad_value("sdpa-batch", sdpa(key=zeros(3, 4, 7, 8)), "key: got shape (3, 4, 7, 8)", "broadcast with query"),
    bad_value("sdpa-length", sdpa(value=zeros(2, 4, 6, 8)), "value: got shape", "as key"),
    bad_type(
        "sdpa-dtype",
        sdpa(value=zeros(2, 4, 7, 8, dtype=HALF)),
        "value: got torch.float16",
        "expected torch.float32, the dtype of query",
    ),
    bad_value("sdpa-head-dim", sdpa(key=zeros(2, 4, 7, 9)), "key: got head_dim 9", "8, the head_dim of query"),
    bad_type("sdpa-mask-type", sdpa(attn_mask="causal"), "attn_mask: got str", TENSOR),
    bad_value("sdpa-mask-shape", sdpa(attn_mask=zeros(5, 6)), "attn_mask: got shape (5, 6)", "(2, 4, 5, 7)"),
    bad_value("sdpa-mask-1d", sdpa(attn_mask=zeros(7)), "attn_mask: got shape (7,)", "expected 2 to 4"),
    bad_value("sdpa-mask-5d", sdpa(attn_mask=zeros(1, 2, 4, 5, 7)), "attn_mask: got shape", "expected 2 to 4"),
    bad_type("sdpa-mask-dtype", sdpa(attn_mask=zeros(5, 7).int()), "attn_mask: got torch.int32", "expected bool"),
    bad_value(
        "sdpa-mask-batch",
        sdpa(query=zeros(3, 2, 4, 5, 8), attn_mask=zeros(2, 2, 1, 5, 7)),
        "attn_mask: got shape (2, 2, 1, 5, 7)",
        "broadcast to (3, 2)",
    ),
    bad_value("sdpa-dropout", sdpa(dropout_p=1.5), "dropout_p: got 1.5", "expected a probability"),
    bad_value("sdpa-scale", sdpa(scale=NAN), "scale: got nan", "expected a finite number"),
]

FLASH = [
    bad_type("flash-k-none", flash(k=None), "k: got NoneType", TENSOR),
    bad_type("flash-v-none", flash_varlen(v=None), "v: got NoneType", TENSOR),
    bad_value("flash-3d", flash(q=zeros(5, 4, 8)), "q: got 3 dimensions (5, 4, 8)", "expected 4"),
    bad_value("flash-scale", flash(softmax_scale=INF), "softmax_scale: got inf", "expected a finite number"),
    bad_value("flash-window", flash(window_size=(3,)), "window_size: got 1 values", "expected a pair"),
    bad_type("flash-window-tensor", flash(window_size=torch.tensor([0.5, 1])), "window_size: got float 0.5"),
    bad_value("flash-dropout", flash(dropout_p=-1.0), "dropout_p: got -1.0", "expected a probability"),
    bad_value("flash-alibi", flash(alibi_slopes=zeros(2)), "alibi_slopes: got shape (2,)", "(4,) or (2, 4)"),
    bad_value("qkv-rank", flash_qkv(qkv=zeros(2, 5, 4, 8)), "qkv: got 4 dimensions", "expected 5: (batch, seqlen"),
    bad_value("qkv-parts", flash_qkv(qkv=zeros(2, 5, 2, 4, 8)), "qkv: got", "(batch, seqlen, 3, heads, head_dim"),
    bad_type("qkv-dtype", flash_qkv(qkv=zeros(2, 5, 3, 4, 8).int()), "qkv: got torch.int32", "expected float16"),
    bad_value("qkv-head-dim", flash_qkv(qkv=zeros(1, 1, 3, 1, 264)), "qkv: got head_dim 264", "1 to 256"),
    bad_type("qkv-type", flash_qkv(qkv="qkv"), "qkv: got str", TENSOR),
    bad_value("kv-parts", flash_kv(kv=zeros(2, 7, 3, 2, 8)), "kv: got", "(batch, seqlen, 2, heads, head_dim)"),
    bad_type("kv-type", flash_kv(kv=None), "kv: got NoneType", TENSOR),
    bad_value("kv-heads", flash_kv(kv=zeros(2, 7, 2, 3, 8)), "kv: got 3 heads", "expected a divisor of 4"),
    bad_type("kv-dtype", flash_kv(kv=zeros(2, 7, 2, 2, 8, dtype=HALF)), "kv: got torch.float16", "float32"),
    bad_type("flash-varlen-cu", flash_varlen(cu_seqlens_q=None), "cu_seqlens_q: got NoneType", TENSOR),
    bad_type("flash-varlen-cu-k", flash_varlen(cu_seqlens_k=None), "cu_seqlens_k: got NoneType", TENSOR),
    bad_type("flash-varlen-max", flash_varlen(max_seqlen_k=None), "max_seqlen_k: got NoneType", "expected an int"),
    bad_value("flash-varlen-table", flash_varlen(block_table=zeros(2, 1).int()), "k: got shape (6, 2, 8)", "pages"),
    bad_value("varlen-qkv-cu", flash_varlen_qkv(cu_seqlens=starts(0, 3, 2)), "cu_seqlens: got 3 then 2", "expec"),
    bad_type("varlen-qkv-cu-type", flash_varlen_qkv(cu_seqlens=(0, 6)), "cu_seqlens: got tuple", TENSOR),
    bad_value("varlen-qkv-max", flash_varlen_qkv(max_seqlen=2), "cu_seqlens: got a seq", "at most 2, max_seqlen"),
    bad_value("varlen-qkv-rank", flash_varlen_qkv(qkv=zeros(2, 3, 3, 4, 8)), "qkv: got 5", "4: (total, 3, heads"),
    bad_value("varlen-kv-rank", flash_varlen_kv(kv=zeros(6, 2, 8)), "kv: got 3", "expected 4: (total, 2, heads"),
    bad_value(
        "varlen-kv-cu",
        flash_varlen_kv(cu_seqlens_k=starts(0, 2, 9)),
        "cu_seqlens_k: got a sequence of 7",
        "expected at most 4",
    ),
]

BAD = [*TENSORS, *NUMBERS, *MASKS, *EXTRAS, *OUT, *BACKEND, *VARLEN, *MERGE, *SDPA, *FLASH]

# What the rows spoil.
GOOD = [
    dense(),
    packed(),
    sdpa(),
    flash(),
    flash_varlen(),
    flash_qkv(),
    flash_kv(),
    flash_varlen_qkv(),
    flash_varlen_kv(),
]
