"""flashtile.nn against torch.nn.MultiheadAttention, and rotary embeddings against their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import close, gradients
from torch import Tensor, nn

import flashtile
from flashtile import ops
from flashtile.problem import Call

BATCH, Q_LEN, K_LEN, SIZE, HEADS = 2, 5, 7, 12, 3

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
    "own-dims": {"kdim": 10, "vdim": 9},
    "own-dims-no-bias": {"kdim": 10, "vdim": 9, "bias": False},
    "bias-kv": {"add_bias_kv": True},
    "zero-attention": {"add_zero_attn": True},
    "both-appended": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}


def pair(**options: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """PyTorch's module and ours with its weights; biases are not the zeros they start with."""
    theirs = nn.MultiheadAttention(SIZE, HEADS, dtype=torch.float64, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = flashtile.nn.MultiheadAttention(SIZE, HEADS, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(module: nn.MultiheadAttention, form: str) -> list[Tensor]:
    """query, key, value: "cross", "memory" (key is value) or "self" (all one)."""

    def leaf(length: int, size: int) -> Tensor:
        shape = (BATCH, length, size) if module.batch_first else (length, BATCH, size)
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    if form == "self":
        return [leaf(Q_LEN, SIZE)] * 3
    query, key = leaf(Q_LEN, SIZE), leaf(K_LEN, module.kdim)
    return [query, key, key if form == "memory" else leaf(K_LEN, module.vdim)]


def check(theirs: nn.MultiheadAttention, ours: nn.MultiheadAttention, tensors: list[Tensor], **options: Any) -> None:
    """Equal outputs, weights and gradients of inputs and parameters."""
    results = [module(*tensors, **options) for module in (theirs, ours)]
    assert (results[0][1] is None) == (results[1][1] is None)
    outs = [tuple(t for t in result if t is not None) for result in results]
    close(outs[1], outs[0])
    upstream = [torch.randn_like(t) for t in outs[0]]
    leaves = list({id(t): t for t in tensors}.values())
    grads = [gradients(out, [*leaves, *m.parameters()], upstream) for out, m in zip(outs, (theirs, ours), strict=True)]
    close(grads[1], grads[0])


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("form", ["self", "memory", "cross"])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(layer: str, form: str, need_weights: bool) -> None:
    if form != "cross" and "kdim" in LAYERS[layer]:
        form = "cross"
    theirs, ours = pair(**LAYERS[layer])
    check(theirs, ours, inputs(theirs, form), need_weights=need_weights)


def attention_mask(kind: str, *shape: int) -> Tensor:
    if kind == "bool":
        hidden = torch.rand(shape) > 0.6
        hidden[..., 0] = False  # else PyTorch has NaN
        return hidden
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("layer", ["plain", "batch-first", "both-appended"])
def test_masks(layer: str, kind: str, need_weights: bool) -> None:
    theirs, ours = pair(**LAYERS[layer])
    tensors = inputs(theirs, "cross")
    padding = attention_mask(kind, BATCH, K_LEN)
    per_head = attention_mask(kind, BATCH * HEADS, Q_LEN, K_LEN)
    shared = attention_mask(kind, Q_LEN, K_LEN)
    options = {"need_weights": need_weights, "average_attn_weights": False}
    check(theirs, ours, tensors, key_padding_mask=padding, **options)
    for mask in (shared, per_head):
        check(theirs, ours, tensors, attn_mask=mask, **options)
        check(theirs, ours, tensors, attn_mask=mask, key_padding_mask=padding, **options)


def test_a_float_mask_beside_a_boolean_one() -> None:
    _, ours = pair(batch_first=True)
    tensors, hidden = inputs(ours, "cross"), attention_mask("bool", BATCH, K_LEN)
    added = attention_mask("float", Q_LEN, K_LEN)
    as_float = torch.zeros(BATCH, K_LEN, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    both = [ours(*tensors, attn_mask=added, key_padding_mask=padding)[0] for padding in (hidden, as_float)]
    close(*both)


@pytest.mark.parametrize("layer", ["plain", "batch-first", "bias-kv"])
def test_causal(layer: str) -> None:
    theirs, ours = pair(**LAYERS[layer])
    hidden = torch.ones(Q_LEN, K_LEN, dtype=torch.bool).triu(1)
    tensors = inputs(theirs, "cross")
    expected = theirs(*tensors, attn_mask=hidden, need_weights=True)
    for options in ({"is_causal": True}, {"is_causal": True, "attn_mask": hidden}, {"attn_mask": hidden}):
        close(ours(*tensors, **options), expected)
    padding = attention_mask("bool", BATCH, K_LEN)
    expected = theirs(*tensors, attn_mask=hidden, key_padding_mask=padding)
    close(ours(*tensors, is_causal=True, key_padding_mask=padding), expected)


@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
def test_without_a_batch(need_weights: bool) -> None:
    for layer in ("plain", "batch-first", "bias-kv"):
        theirs, ours = pair(**LAYERS[layer])
        tensors = [torch.randn(n, SIZE, dtype=torch.float64, requires_grad=True) for n in (Q_LEN, K_LEN, K_LEN)]
        padding = attention_mask("bool", K_LEN)
        check(theirs, ours, tensors, need_weights=need_weights, key_padding_mask=padding)


def test_rows_that_see_nothing_have_no_weights() -> None:
    _, ours = pair(batch_first=True)
    hidden = torch.ones(Q_LEN, K_LEN, dtype=torch.bool)
    out, weights = ours(*inputs(ours, "cross"), attn_mask=hidden)
    assert weights is not None and not bool(weights.any())
    close(out, ours.out_proj.bias.expand_as(out))


def test_state_dicts_are_interchangeable() -> None:
    for options in LAYERS.values():
        theirs, ours = pair(**options)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
        assert isinstance(ours, nn.MultiheadAttention)


def test_returned_weights_are_those_of_the_output_with_dropout() -> None:
    _, ours = pair(dropout=0.5, batch_first=True)
    query, key, value = inputs(ours, "cross")
    with torch.no_grad():
        out, weights = ours(query, key, value, average_attn_weights=False)
        v = (value @ ours.in_proj_weight[2 * SIZE :].T + ours.in_proj_bias[2 * SIZE :]).unflatten(-1, (HEADS, -1))
        close(out, ours.out_proj((weights @ v.transpose(1, 2)).transpose(1, 2).flatten(2)))
    assert 0.2 < float((weights == 0).double().mean()) < 0.8
    ours.eval()
    assert not bool((ours(query, key, value)[1] == 0).any())


@pytest.mark.parametrize(("form", "packed"), [("self", (None, None)), ("memory", (..., None)), ("cross", (..., ...))])
def test_one_projection_is_never_taken_apart(form: str, packed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Call] = []
    attend = ops.attention
    monkeypatch.setattr(ops, "attention", lambda call: calls.append(call) or attend(call))
    _, ours = pair(batch_first=True)
    ours(*inputs(ours, form), need_weights=False)
    assert tuple(t if t is None else ... for t in calls[0][1:3]) == packed


def test_lower_precision_and_autocast() -> None:
    layer = flashtile.nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
    x = torch.randn(BATCH, Q_LEN, SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = layer(x, x, x, key_padding_mask=torch.zeros(BATCH, Q_LEN))
    assert out.dtype == weights.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x, x, x)[0], rtol=0.05, atol=0.05)


def test_compiles_to_one_graph_and_exports() -> None:
    torch._dynamo.reset()
    layer = flashtile.nn.MultiheadAttention(SIZE, HEADS, batch_first=True).eval()
    padding = torch.zeros(BATCH, Q_LEN, dtype=torch.bool)
    padding[0, -1] = True

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.rotary = layer, flashtile.nn.RotaryEmbedding(4)

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            q, k = (x.unflatten(-1, (HEADS, -1)) for _ in range(2))
            turned = self.rotary(q, k, offset=3)[0].flatten(2)
            return self.attention(turned, turned, turned, padding, need_weights=False)[0]

    x = torch.randn(BATCH, Q_LEN, SIZE)
    compiled = torch.compile(Block(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, padding), Block()(x, padding))
    program = torch.export.export(Block(), (x, padding))
    assert torch.ops.flashtile.forward.default in {node.target for node in program.graph.nodes}
    torch.testing.assert_close(program.module()(x, padding), Block()(x, padding))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"query": torch.zeros(2, 5, 11)}, r"^query: got shape \(2, 5, 11\), expected 2 or 3 dimensions"),
        ({"value": torch.zeros(2, 6, 12)}, r"^value: got shape \(2, 6, 12\), expected \(2, 7\) before its features"),
        ({"key_padding_mask": torch.zeros(2, 5)}, r"^key_padding_mask: got shape \(2, 5\), expected \(2, 7\)"),
        ({"attn_mask": torch.zeros(3, 5, 7)}, r"^attn_mask: got shape \(3, 5, 7\), expected \(5, 7\) or \(6, 5, 7\)"),
        ({"attn_mask": torch.zeros(5, 7, dtype=torch.int64)}, "^attn_mask: got torch.int64, expected bool"),
    ],
)
def test_refusals(change: dict[str, Tensor], sentence: str) -> None:
    layer = flashtile.nn.MultiheadAttention(SIZE, HEADS, batch_first=True)
    right = {"query": torch.zeros(2, 5, 12), "key": torch.zeros(2, 7, 12), "value": torch.zeros(2, 7, 12)}
    with pytest.raises((TypeError, ValueError), match=sentence):
        layer(**{**right, **change})


def rotated(x: Tensor, positions: Tensor, dim: int, base: float, interleaved: bool) -> Tensor:
    """By the definition: pairs of features are complex numbers, turned by position / base^(2i / dim)."""
    angle = positions.double()[..., None] * base ** (-torch.arange(0, dim, 2).double() / dim)
    turn = torch.polar(torch.ones_like(angle), angle).unsqueeze(-2)
    head, rest = x[..., :dim].double(), x[..., dim:].double()
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else torch.stack(head.chunk(2, -1), -1)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    return torch.cat([turned.flatten(-2) if interleaved else torch.cat(turned.unbind(-1), -1), rest], -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rotary_embedding(dtype: torch.dtype, interleaved: bool) -> None:
    rotary = flashtile.nn.RotaryEmbedding(8, 100.0, interleaved=interleaved)
    q, k = torch.randn(2, 6, 4, 12).to(dtype), torch.randn(2, 6, 2, 12).to(dtype)
    starts, rows = torch.tensor([3, 9]), torch.arange(6)
    own = torch.tensor([0, 1, 2, 0, 1, 2])
    cases = [({}, rows), ({"offset": 5}, rows + 5), ({"offset": torch.tensor(5)}, rows + 5),
             ({"offset": starts}, rows + starts[:, None]), ({"positions": own}, own),
             ({"positions": rows + starts[:, None]}, rows + starts[:, None])]  # fmt: skip
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for options, positions in cases:
        for x, turned in zip((q, k), rotary(q, k, **options), strict=True):
            assert turned.dtype == dtype
            want = rotated(x, positions, 8, 100.0, interleaved)
            torch.testing.assert_close(turned.double(), want, rtol=tolerance, atol=tolerance)
    packed = rotary(q[0], k[0], positions=own)
    close(packed, [x[0] for x in rotary(q, k, positions=own)])


def test_scores_depend_on_distances_alone() -> None:
    rotary = flashtile.nn.RotaryEmbedding(8).double()
    q, k = torch.randn(1, 6, 2, 8, dtype=torch.float64), torch.randn(1, 6, 2, 8, dtype=torch.float64)
    here, there = (torch.einsum("bmhd,bnhd->bhmn", *rotary(q, k, offset=n)) for n in (0, 40))
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)
    assert not list(rotary.state_dict())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"positions": torch.arange(5)}, r"^positions: got shape \(5,\), expected \(6,\) or \(2, 6\)"),
        ({"positions": torch.arange(6), "offset": 2}, "^offset: got an offset beside positions"),
        ({"offset": torch.arange(3)}, r"^offset: got shape \(3,\), expected an int or \(2,\)"),
        ({"q": torch.zeros(2, 6, 4, 7)}, r"^q: got shape \(2, 6, 4, 7\), expected .* head_dim of 8 or more"),
        ({"k": torch.zeros(2, 5, 4, 8)}, r"^k: got shape \(2, 5, 4, 8\), expected \(2, 6\) before heads"),
        ({"q": torch.zeros(6, 4, 8), "k": torch.zeros(6, 4, 8)}, "^q: got shape .* without positions"),
    ],
)
def test_rotary_refusals(options: dict[str, Any], sentence: str) -> None:
    rotary = flashtile.nn.RotaryEmbedding(8)
    with pytest.raises((TypeError, ValueError), match=sentence):
        rotary(**{"q": torch.zeros(2, 6, 4, 8), "k": torch.zeros(2, 6, 4, 8), **options})
    for wrong in (7, 0, 2.0, True):
        with pytest.raises(ValueError, match="^dim: got"):
            flashtile.nn.RotaryEmbedding(wrong)
    with pytest.raises(ValueError, match="^base: got 0"):
        flashtile.nn.RotaryEmbedding(8, 0.0)
