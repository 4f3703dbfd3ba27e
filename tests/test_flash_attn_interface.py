"""flash_attn.flash_attn_interface beyond its public functions: single steps, operators, autograd classes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from oracle import alibi, band, close, gradients, standard
from torch import Tensor

import flashtile
from flashtile.integrations.flash_attn import interface, raw

GRADS = ["dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"]
STARTS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
NUMBERS = ["dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap", "alibi_slopes"]
SIGNATURES = {
    "_flash_attn_forward": (["q", "k", "v", *NUMBERS, "return_softmax"], {}),
    "_flash_attn_varlen_forward": (
        ["q", "k", "v", *STARTS, *NUMBERS, "return_softmax", "block_table", "leftpad_k", "seqused_k", "zero_tensors",
         "num_splits"],
        {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None, "return_softmax": False,
         "block_table": None, "leftpad_k": None, "seqused_k": None, "zero_tensors": False, "num_splits": 0},
    ),
    "_flash_attn_backward": ([*GRADS, *NUMBERS, "deterministic", "rng_state"], {"rng_state": None}),
    "_flash_attn_varlen_backward": (
        [*GRADS, *STARTS, *NUMBERS, "deterministic", "rng_state", "zero_tensors"],
        {"rng_state": None, "zero_tensors": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_is_exactly_the_original(name: str) -> None:
    names, defaults = SIGNATURES[name]
    parameters = inspect.signature(getattr(interface, name)).parameters.values()
    assert [p.name for p in parameters] == names
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == defaults


def test_every_name_that_it_lists_is_there() -> None:
    assert all(hasattr(interface, name) for name in interface.__all__)
    assert all(callable(getattr(interface.flash_attn_gpu, name)) for name in SIGNATURES_OF_RAW)


SIGNATURES_OF_RAW = {"fwd": 13, "bwd": 19, "varlen_fwd": 22, "varlen_bwd": 24, "fwd_kvcache": 20}


@pytest.mark.parametrize("name", SIGNATURES_OF_RAW)
def test_raw_functions_take_as_many_arguments_as_the_original(name: str) -> None:
    assert len(inspect.signature(getattr(raw, name)).parameters) == SIGNATURES_OF_RAW[name]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


SLOPES = torch.tensor([0.1, 0.2, 0.4, 0.8])
# id: (dropout_p and what follows it, as `_flash_attn_forward` has them, the same for `standard` with 5 rows, 7 keys)
STEPS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "plain": ((0.0, 0.4, False, -1, -1, 0.0, None), {"scale": 0.4}),
    "causal": ((0.0, 0.4, True, -1, -1, 0.0, None), {"scale": 0.4, "seen": band(5, 7, None, 0)}),
    "window": ((0.0, 0.4, False, 2, 1, 0.0, None), {"scale": 0.4, "seen": band(5, 7, 2, 1)}),
    "causal-window": ((0.0, 0.4, True, 2, 2, 0.0, None), {"scale": 0.4, "seen": band(5, 7, 2, 0)}),
    "softcap": ((0.0, 0.4, False, -1, -1, 0.9, None), {"scale": 0.4, "softcap": 0.9}),
    "alibi": ((0.0, 0.4, True, -1, -1, 0.0, SLOPES), {"scale": 0.4, "seen": band(5, 7, None, 0), "added": SLOPES}),
}


def definition(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    slopes = options.get("added")
    added = None if slopes is None else alibi(slopes.double(), q.shape[1], k.shape[1])
    return standard(q, k, v, **{**options, "added": added})


@pytest.mark.parametrize("name", STEPS)
def test_one_step_forward_and_one_step_back(name: str) -> None:
    numbers, options = STEPS[name]
    q, k, v = (randn(2, n, h, 8).requires_grad_() for n, h in ((5, 4), (7, 2), (7, 2)))
    out, lse, pattern, rng_state = interface._flash_attn_forward(q, k, v, *numbers, False)
    expected, expected_lse = definition(q, k, v, options)
    close((out, lse), (expected.detach(), expected_lse.detach()))
    assert not out.requires_grad
    assert (pattern.numel(), rng_state.shape, rng_state.dtype) == (0, (2,), torch.int64)

    dout = randn(2, 8, 5, 4).permute(0, 2, 3, 1)
    packed = torch.full((2, 7, 2, 2, 8), torch.nan, dtype=torch.float64)  # dk and dv are parts of one tensor
    dq, dk, dv = torch.full_like(q, torch.nan), packed[:, :, 0], packed[:, :, 1]
    delta = interface._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, *numbers, False)
    close([dq, dk, dv], gradients((expected,), [q, k, v], [dout]))
    assert (delta.shape, delta.dtype) == ((2, 4, 128), torch.float32)
    torch.testing.assert_close(delta[..., :5].double(), (dout * out).sum(-1).transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert not bool(delta[..., 5:].any())


def test_a_row_that_sees_nothing_goes_back_with_plus_infinity() -> None:
    q, k, v = (randn(1, n, 2, 8).requires_grad_() for n in (5, 2, 2))
    numbers = (0.0, 0.4, True, -1, -1, 0.0, None)
    out, lse, *_ = interface._flash_attn_forward(q, k, v, *numbers, False)
    assert bool((lse[:, :, :3] == torch.inf).all())
    grads = [torch.full_like(t, torch.nan) for t in (q, k, v)]
    dout = randn(1, 5, 2, 8)
    interface._flash_attn_backward(dout, q, k, v, out, lse, *grads, *numbers, True)
    expected, _ = standard(q, k, v, scale=0.4, seen=band(5, 2, None, 0))
    close(grads, gradients((expected,), [q, k, v], [dout]))


def test_dropout_steps_are_the_public_function_bit_for_bit() -> None:
    q, k, v = (torch.randn(2, n, 4, 8).requires_grad_() for n in (5, 7, 7))
    dout = torch.randn(2, 5, 4, 8)
    torch.manual_seed(5)
    public, public_lse, public_pattern = flashtile.flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    numbers = (0.3, 8**-0.5, True, -1, -1, 0.0, None)
    torch.manual_seed(5)
    out, lse, pattern, rng_state = interface._flash_attn_forward(q, k, v, *numbers, True)
    for ours, theirs in ((out, public), (lse, public_lse), (pattern, public_pattern)):
        assert torch.equal(ours, theirs)
    grads = [torch.empty_like(t) for t in (q, k, v)]
    before = torch.get_rng_state()
    delta = interface._flash_attn_backward(dout, q, k, v, out, lse, *grads, *numbers, False, rng_state)
    assert torch.equal(torch.get_rng_state(), before)  # the generator is left alone
    for ours, theirs in zip(grads, gradients((public,), [q, k, v], [dout]), strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(delta[..., :5], 0.7 * (dout * out).sum(-1).transpose(1, 2).detach())


def test_the_pattern_is_normalised_as_the_original_s_tests_do_it() -> None:
    """Magnitudes times exp(largest score of the row - lse) are the probabilities, for blocks of _get_block_size_n."""
    q, k, v = (torch.randn(1, n, 2, 8, dtype=torch.float64) for n in (5, 7, 7))
    _, lse, pattern = flashtile.flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    scores = (q.transpose(1, 2) @ k.transpose(1, 2).mT * 8**-0.5).masked_fill(~band(5, 7, None, 0), -torch.inf)
    blocks = scores.split(interface._get_block_size_n(q.device, 8, True, True), -1)
    assert len(blocks) == 1
    close(pattern[..., :5, :7].abs() * torch.exp(blocks[0].amax(-1) - lse)[..., None], scores.softmax(-1))


Q_STARTS, K_STARTS = torch.tensor([0, 3, 3, 8], dtype=torch.int32), torch.tensor([0, 4, 6, 6], dtype=torch.int32)


def each_alone(q: Tensor, k: list[Tensor], v: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of three packed sequences with their own keys; the ninth row belongs to none."""
    outs, lses = [], []
    for b, (start, end) in enumerate(zip(Q_STARTS.tolist(), Q_STARTS.tolist()[1:], strict=False)):
        seen = band(end - start, k[b].shape[0], None, 0)
        out, lse = standard(q[None, start:end], k[b][None], v[b][None], seen=seen, **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat([*outs, torch.zeros_like(q[8:])]), torch.cat(
        [*lses, torch.full((q.shape[1], 1), -torch.inf).double()], 1
    )


def test_packed_steps_are_each_sequence_alone() -> None:
    q, k, v = (randn(n, h, 8).requires_grad_() for n, h in ((9, 4), (7, 2), (7, 2)))
    starts, numbers = (Q_STARTS, K_STARTS, 5, 4), (0.0, 0.4, True, -1, -1, 0.0, None)
    out, lse, *_ = interface._flash_attn_varlen_forward(q, k, v, *starts, *numbers)
    parts = [[t[a:b] for a, b in ((0, 4), (4, 6), (6, 6))] for t in (k, v)]
    expected, expected_lse = each_alone(q, *parts, scale=0.4)
    close(out, expected.detach())
    close(lse, expected_lse.detach().masked_fill(expected_lse == -torch.inf, torch.inf))

    dout, grads = randn(9, 4, 8), [torch.full_like(t, torch.nan) for t in (q, k, v)]
    delta = interface._flash_attn_varlen_backward(dout, q, k, v, out, lse, *grads, *starts, *numbers, False)
    close(grads, gradients((expected,), [q, k, v], [dout]))
    rows = (dout * out).sum(-1).float().T
    assert delta.shape == (4, 9 + 3 * 128)
    for b, (start, end) in enumerate(((0, 3), (3, 3), (3, 8))):
        place = (start + 128 * b) // 128 * 128
        torch.testing.assert_close(delta[:, place : place + end - start], rows[:, start:end])
    assert int((delta != 0).sum()) == 4 * 3  # rows of the first sequence; the third has no keys, and so no output


def test_zero_tensors_leaves_minus_infinity_behind_the_last_sequence() -> None:
    q, k = randn(9, 4, 8), randn(7, 2, 8)
    for zero, last in ((False, torch.inf), (True, -torch.inf)):
        out, lse, *_ = interface._flash_attn_varlen_forward(
            q, k, k, Q_STARTS, K_STARTS, 5, 4, 0.0, 0.4, False, zero_tensors=zero
        )
        assert bool((lse[:, 8] == last).all())
        assert bool((lse[:, 3:8] == torch.inf).all())  # these have a sequence, and no keys
        assert not bool(out[8].any())


@pytest.mark.parametrize("in_pages", [False, True])
@pytest.mark.parametrize("kind", ["used", "leftpad", "both"])
def test_keys_in_use(in_pages: bool, kind: str) -> None:
    used = torch.tensor([2, 2, 0], dtype=torch.int32) if kind != "leftpad" else None
    skipped = torch.tensor([1, 0, 2], dtype=torch.int32) if kind != "used" else None
    q, k, v = (randn(n, h, 8) for n, h in ((9, 4), (7, 2), (7, 2)))
    parts: list[list[Tensor]] = [[], []]
    for tensor, part in ((k, parts[0]), (v, parts[1])):
        for b, (start, end) in enumerate(((0, 4), (4, 6), (6, 6))):
            end = end if used is None else start + int(used[b])
            part.append(tensor[min(start if skipped is None else start + int(skipped[b]), end) : end])
    options: dict[str, Any] = {"leftpad_k": skipped, "seqused_k": used}
    arguments = (k, v)
    if in_pages:
        arguments, options["block_table"] = paged(k), PAGES
        arguments = (paged(k), paged(v))
    out, lse, *_ = interface._flash_attn_varlen_forward(
        q, *arguments, Q_STARTS, K_STARTS, 5, 4, 0.0, 0.4, True, **options
    )
    expected, expected_lse = each_alone(q, *parts, scale=0.4)
    close(out, expected)
    close(lse, expected_lse.masked_fill(expected_lse == -torch.inf, torch.inf))


PAGES = torch.tensor([[4, 1], [2, -1], [-1, -1]], dtype=torch.int32)


def paged(tokens: Tensor) -> Tensor:
    """Packed keys (of sequences with 4, 2 and 0) in pages of 3, as PAGES has them; the rest is NaN."""
    pages = torch.full((5, 3, *tokens.shape[1:]), torch.nan, dtype=tokens.dtype)
    pages[4], pages[1, :1], pages[2, :2] = tokens[:3], tokens[3:4], tokens[4:6]
    return pages


def test_keys_in_pages_are_packed_keys_with_gradients() -> None:
    q, k, v = (randn(n, h, 8).requires_grad_() for n, h in ((9, 4), (7, 2), (7, 2)))
    k_pages, v_pages = (paged(t.detach()).requires_grad_() for t in (k, v))
    starts, dout = (Q_STARTS, K_STARTS, 5, 4), randn(9, 4, 8)
    torch.manual_seed(3)
    expected = flashtile.flash_attn_varlen_func(q, k, v, *starts, 0.2, causal=True, return_attn_probs=True)
    torch.manual_seed(3)
    results = flashtile.flash_attn_varlen_func(
        q, k_pages, v_pages, *starts, 0.2, causal=True, return_attn_probs=True, block_table=PAGES
    )
    close(results, expected)
    dq, dk, dv = gradients((results[0],), [q, k_pages, v_pages], [dout])
    wanted = gradients((expected[0],), [q, k, v], [dout])
    close(dq, wanted[0])
    for grad, want in ((dk, wanted[1]), (dv, wanted[2])):
        close(grad.nan_to_num(), paged(want).nan_to_num())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_table": PAGES[:2]}, "block_table: got shape (2, 2), expected (3,"),
        ({"block_table": PAGES.float()}, "block_table: got torch.float32"),
        ({"block_table": PAGES.clone().fill_(5)}, "block_table: got 5, expected 0 to 4"),
        ({"block_table": PAGES[:, :1]}, "cu_seqlens_k: got 4, expected 0 to 3"),
        ({"k": randn(7, 2, 8)}, "k: got shape (7, 2, 8)"),
        ({"cu_seqlens_k": K_STARTS.long()}, "cu_seqlens_k: got torch.int64"),
    ],
)
def test_bad_pages_are_named(changes: dict[str, Any], words: str) -> None:
    keys = paged(randn(7, 2, 8))
    arguments = {"q": randn(9, 4, 8), "k": keys, "v": keys, "cu_seqlens_q": Q_STARTS, "cu_seqlens_k": K_STARTS}
    with pytest.raises((TypeError, ValueError)) as caught:
        flashtile.flash_attn_varlen_func(
            **{**arguments, "max_seqlen_q": 5, "max_seqlen_k": 4, "block_table": PAGES, **changes}
        )
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"rng_state": None}, ValueError, "rng_state: got NoneType"),
        ({"dq": torch.zeros(1, 5, 4, 8)}, ValueError, "dq: got torch.float32 (1, 5, 4, 8)"),
        ({"dv": torch.zeros(2, 7, 2, 8).half()}, ValueError, "dv: got torch.float16"),
        ({"dout": torch.zeros(2, 5, 4, 7)}, ValueError, "dout: got torch.float32 (2, 5, 4, 7)"),
        ({"out": None}, TypeError, "out: got NoneType"),
        ({"k": None}, TypeError, "k: got NoneType"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale: got str"),
    ],
)
def test_bad_steps_back_are_named(changes: dict[str, Any], kind: type[Exception], words: str) -> None:
    q, k = torch.zeros(2, 5, 4, 8), torch.zeros(2, 7, 2, 8)
    step = dict(
        zip(
            [*GRADS, *NUMBERS],
            [q, q, k, k, q, torch.zeros(2, 4, 5), None, None, None, 0.1, 1.0, False, -1, -1, 0.0, None],
            strict=True,
        )
    )
    step |= {"deterministic": False, "rng_state": torch.zeros(2, dtype=torch.int64)}
    interface._flash_attn_backward(**step)
    with pytest.raises(kind) as caught:
        interface._flash_attn_backward(**{**step, **changes})
    assert words in str(caught.value)


def test_bad_parts_in_use_are_named() -> None:
    q, k = randn(9, 4, 8), randn(7, 2, 8)
    step = (q, k, k, Q_STARTS, K_STARTS, 5, 4, 0.0, 0.4, False)
    for name, values, words in (
        ("seqused_k", [5, 0, 0], "seqused_k: got 5"),
        ("leftpad_k", [0, -1, 0], "leftpad_k: got -1"),
        ("leftpad_k", [0, 1], "leftpad_k: got shape (2,)"),
    ):
        with pytest.raises(ValueError) as caught:
            interface._flash_attn_varlen_forward(*step, **{name: torch.tensor(values, dtype=torch.int32)})
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="num_splits: got -2"):
        interface._flash_attn_varlen_forward(*step, num_splits=-2)


def test_the_generator_is_refused() -> None:
    q = randn(1, 3, 2, 8)
    with pytest.raises(RuntimeError, match="gen: got a random generator"):
        raw.fwd(q, q, q, None, None, 0.1, 1.0, False, -1, -1, 0.0, False, torch.Generator())


def test_raw_steps_write_what_they_are_given() -> None:
    q, k, v = randn(2, 5, 4, 8), randn(2, 7, 2, 8), randn(2, 7, 2, 8)
    out = torch.full_like(q, torch.nan)
    result, lse, _, rng_state = raw.fwd(q, k, v, out, None, 0.0, 0.4, True, -1, -1, 0.0, False, None)
    assert result is out
    close(out, standard(q, k, v, scale=0.4, seen=band(5, 7, None, 0))[0])
    dout = randn(2, 5, 4, 8)
    made = raw.bwd(
        dout, q, k, v, out, lse, None, None, None, None, 0.0, 0.4, True, -1, -1, 0.0, False, None, rng_state
    )  # fmt: skip
    assert [t.shape for t in made[:3]] == [q.shape, k.shape, v.shape]
    caches = randn(2, 7, 2, 8), randn(2, 7, 2, 8)
    held, answer = torch.tensor([3, 7], dtype=torch.int32), torch.full_like(q, torch.nan)
    options = (None, None, None, None, None, answer, 0.4, True, -1, -1, 0.0, True, 0)
    written, _ = raw.fwd_kvcache(q, *caches, None, None, held, None, *options)
    assert written is answer
    assert torch.equal(
        answer, flashtile.flash_attn_with_kvcache(q, *caches, cache_seqlens=held, softmax_scale=0.4, causal=True)
    )


def operator_calls() -> dict[str, tuple[Any, ...]]:
    q, k, lse = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8), torch.zeros(2, 4, 5)
    packed, keys, ends = torch.randn(9, 4, 8), torch.randn(7, 2, 8), (Q_STARTS, K_STARTS, 5, 4)
    numbers, rng = (0.1, 0.4, True, -1, -1, 0.0, None), torch.zeros(2, dtype=torch.int64)
    grads, packed_grads = ([torch.zeros_like(t) for t in ts] for ts in ((q, k, k), (packed, keys, keys)))
    return {
        "_flash_attn_forward": (q, k, k, *numbers, True),
        "_flash_attn_varlen_forward": (packed, keys, keys, *ends, *numbers, True),
        "_flash_attn_backward": (q, q, k, k, q, lse, *grads, *numbers, False, rng),
        "_flash_attn_varlen_backward": (
            packed, packed, keys, keys, packed, torch.zeros(4, 9), *packed_grads, *ends, *numbers, False, rng,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_operators_keep_their_contract(name: str) -> None:
    operator = getattr(torch.ops.flash_attn, name)
    assert getattr(interface, name.replace("_flash", "_wrapped_flash", 1)) is operator
    arguments = operator_calls()[name]
    torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
    if "forward" in name:  # dropout would draw anew in each of the runs that this compares
        plain = [
            0.0 if index == (3 if name == "_flash_attn_forward" else 7) else a for index, a in enumerate(arguments)
        ]
        torch.library.opcheck(operator.default, tuple(plain), test_utils=("test_schema", "test_aot_dispatch_dynamic"))


def test_a_compiled_step_is_one_graph() -> None:
    arguments = operator_calls()["_flash_attn_forward"]
    plain = (*arguments[:3], 0.0, *arguments[4:])
    compiled = torch.compile(
        lambda *a: interface._wrapped_flash_attn_forward(*a)[0], fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(*plain), interface._flash_attn_forward(*plain)[0])


TAIL = (0.0, None, True, (2, -1), 0.0, None, False)  # dropout_p ... deterministic


@pytest.mark.parametrize("returned", [False, True])
def test_autograd_classes_are_the_public_functions(returned: bool) -> None:
    q, kv, qkv = (torch.randn(2, 5, *shape, 8).requires_grad_() for shape in ((4,), (2, 2), (3, 4)))
    rows, pairs, triples = (torch.randn(9, *shape, 8).requires_grad_() for shape in ((4,), (2, 2), (3, 4)))
    ends = torch.tensor([0, 4, 9], dtype=torch.int32)
    k, v = kv.detach().unbind(2)
    keys, values = pairs.detach().unbind(1)
    calls = {
        "FlashAttnFunc": (flashtile.flash_attn_func, (q, k, v), ()),
        "FlashAttnKVPackedFunc": (flashtile.flash_attn_kvpacked_func, (q, kv), ()),
        "FlashAttnQKVPackedFunc": (flashtile.flash_attn_qkvpacked_func, (qkv,), ()),
        "FlashAttnVarlenFunc": (flashtile.flash_attn_varlen_func, (rows, keys, values, ends, ends, 5, 5), (None,)),
        "FlashAttnVarlenKVPackedFunc": (flashtile.flash_attn_varlen_kvpacked_func, (rows, pairs, ends, ends, 5, 5), ()),
        "FlashAttnVarlenQKVPackedFunc": (flashtile.flash_attn_varlen_qkvpacked_func, (triples, ends, 5), ()),
    }
    for name, (function, tensors, rest) in calls.items():
        apply = getattr(interface, name).apply
        result, expected = apply(*tensors, *TAIL, returned, *rest, True), function(*tensors, *TAIL, returned, *rest)
        assert isinstance(result, tuple) is returned
        first, wanted = (t[0] if returned else t for t in (result, expected))
        assert torch.equal(first, wanted)
        leaf = tensors[0]
        assert torch.equal(*(torch.autograd.grad(t.sum(), leaf)[0] for t in (first, wanted)))
        without = apply(*tensors, *TAIL, False, *rest, False)
        assert not without.requires_grad


def test_odds_and_ends() -> None:
    x = torch.randn(3, 4)
    assert interface.maybe_contiguous(None) is None
    assert interface.maybe_contiguous(x) is x
    assert interface.maybe_contiguous(x.T).stride(-1) == 1
    assert [interface.round_multiple(n, 128) for n in (0, 1, 128, 129)] == [0, 128, 128, 256]
    assert interface.USE_TRITON_ROCM is False
    assert interface.flash_attn_gpu is raw
