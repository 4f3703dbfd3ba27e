"""`replace_sdpa`: PyTorch's modules and functions run on flashtile, and what does not is listed."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host_time import added_host_time
from oracle import close, gradients
from process import fresh_process
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import flashtile
from flashtile import ops

KEPT = (F.scaled_dot_product_attention,)  # in a tuple: a name in a module would be replaced too


@pytest.fixture(autouse=True)
def _pytorch_gets_its_function_back() -> Iterator[None]:
    fast_path = torch.backends.mha.get_fastpath_enabled()
    yield
    assert F.scaled_dot_product_attention is KEPT[0]
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The native calls."""
    made: list[Any] = []
    attend = ops.attention
    monkeypatch.setattr(ops, "attention", lambda call, out=None: made.append(call) or attend(call, out))
    return made


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def test_for_a_while(calls: list[Any]) -> None:
    q = leaf(2, 3, 5, 8)
    want = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with flashtile.replace_sdpa() as replacement:
        out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
        assert "active: 1 calls on flashtile, passed on: none" in repr(replacement)
    close(out, want)
    assert len(calls) == replacement.served == 1 and not replacement.passed_on
    F.scaled_dot_product_attention(q, q, q)
    assert len(calls) == 1
    assert "ended" in repr(replacement)


def test_for_the_process_and_an_error_inside(calls: list[Any]) -> None:
    q = leaf(2, 3, 5, 8)
    replacement = flashtile.replace_sdpa()
    F.scaled_dot_product_attention(q, q, q)
    replacement.restore()
    replacement.restore()
    assert len(calls) == 1
    with pytest.raises(ZeroDivisionError), flashtile.replace_sdpa():
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is KEPT[0]


@pytest.mark.parametrize("first_ends_first", [False, True])
def test_several_at_a_time(first_ends_first: bool) -> None:
    q = leaf(2, 3, 5, 8)
    pair = [flashtile.replace_sdpa(), flashtile.replace_sdpa()]
    F.scaled_dot_product_attention(q, q, q)
    pair.pop(0 if first_ends_first else 1).restore()
    assert F.scaled_dot_product_attention is not KEPT[0]
    F.scaled_dot_product_attention(q, q, q)
    assert pair[0].served == (2 if first_ends_first else 1)
    pair[0].restore()


def test_modules_that_imported_it_by_name(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("somebody_elses")
    exec("from torch.nn.functional import scaled_dot_product_attention as attend", module.__dict__)  # noqa: S102
    monkeypatch.setitem(sys.modules, "somebody_elses", module)
    q = leaf(2, 3, 5, 8)
    with flashtile.replace_sdpa():
        module.attend(q, q, q)
        late = F.scaled_dot_product_attention
    assert len(calls) == 1
    assert module.attend is KEPT[0]
    close(late(q, q, q, scale=0.5), KEPT[0](q, q, q, scale=0.5))
    assert len(calls) == 1, "a name bound meanwhile goes back to PyTorch too"


def test_transforms() -> None:
    """torch.func's gradients and vmap go through flashtile as they do without a replacement."""
    q = torch.randn(3, 2, 4, 8, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, is_causal=True).square().sum()

    with sdpa_kernel(SDPBackend.MATH):
        want = torch.vmap(torch.func.grad(loss))(q)
    with flashtile.replace_sdpa() as replacement:
        close(torch.vmap(torch.func.grad(loss))(q), want)
    assert replacement.served == 1 and not replacement.passed_on


CALLS: dict[str, Callable[[], tuple[tuple[Tensor, ...], dict[str, Any]]]] = {
    "plain": lambda: ((leaf(2, 3, 5, 8), leaf(2, 3, 7, 8), leaf(2, 3, 7, 8)), {}),
    "causal": lambda: ((leaf(2, 3, 5, 8), leaf(2, 3, 7, 8), leaf(2, 3, 7, 8)), {"is_causal": True, "scale": 0.3}),
    "grouped": lambda: ((leaf(2, 4, 5, 8), leaf(2, 2, 7, 8), leaf(2, 2, 7, 6)), {"enable_gqa": True}),
    "boolean": lambda: ((leaf(2, 3, 5, 8),) * 3, {"attn_mask": torch.rand(2, 1, 5, 5) > 0.3}),
    "additive": lambda: ((leaf(2, 3, 5, 8),) * 3, {"attn_mask": leaf(3, 5, 5)}),
    "three-dimensional": lambda: ((leaf(3, 5, 8), leaf(3, 7, 8), leaf(3, 7, 8)), {}),
    "upper-left": lambda: ((leaf(2, 3, 5, 8), *(leaf(2, 3, 7, 8),) * 2), {"attn_mask": causal_upper_left(5, 7)}),
    "lower-right": lambda: ((leaf(2, 3, 5, 8), *(leaf(2, 3, 7, 8),) * 2), {"attn_mask": causal_lower_right(5, 7)}),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_every_kind_are_served(name: str) -> None:
    tensors, options = CALLS[name]()
    mask = options.get("attn_mask")
    leaves = [*tensors, *([mask] if mask is not None and mask.requires_grad else [])]
    want = F.scaled_dot_product_attention(*tensors, **options)
    with flashtile.replace_sdpa() as replacement:
        out = F.scaled_dot_product_attention(*tensors, **options)
    assert replacement.served == 1 and not replacement.passed_on
    close(out, want)
    dout = torch.randn_like(want)
    close(gradients((out,), leaves, [dout]), gradients((want,), leaves, [dout]))


def in_a_kernel_of_its_own(q: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, q, q)


def forward_mode(q: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # the only one of PyTorch's that has such derivatives
        return torch.func.jvp(attend, (q,), (torch.ones_like(q),))[1]


class Answering(Tensor):
    """A kind of tensor that has an attention of its own."""

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is KEPT[0]:
            return torch.ones(1)
        return super().__torch_function__(function, kinds, args, kwargs or {})


def attend(q: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, q, q, **options)


PASSED_ON: dict[str, tuple[Callable[[], Any], str]] = {
    "head-dim": (lambda: attend(torch.randn(1, 1, 4, 300)), "query: got head_dim 300, expected 1 to 256"),
    "subclass": (lambda: attend(torch.randn(1, 1, 4, 8).as_subclass(Answering)), "query is a Answering, which has"),
    "nested": (
        lambda: attend(torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 5, 8)])).to_padded_tensor(0.0),
        "query is a nested tensor",
    ),
    "mask-and-causal": (
        lambda: attend(torch.randn(1, 1, 4, 8), attn_mask=torch.ones(4, 4).tril().bool(), is_causal=True),
        "attn_mask: got a mask together with is_causal=True",
    ),
    "kernel": (lambda: in_a_kernel_of_its_own(torch.randn(1, 1, 4, 8)), "torch.nn.attention.sdpa_kernel excludes"),
    "forward-mode": (lambda: forward_mode(torch.randn(1, 1, 4, 8)), "forward-mode derivatives are PyTorch's own"),
    "trace": (
        lambda: torch.jit.trace(attend, torch.randn(1, 1, 4, 8), check_trace=False)(torch.randn(1, 1, 4, 8)),
        "torch.jit.trace records PyTorch's own operations only",
    ),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("name", PASSED_ON)
def test_what_goes_to_pytorch_is_listed(name: str) -> None:
    run, reason = PASSED_ON[name]
    torch.manual_seed(0)
    want = run()
    torch.manual_seed(0)
    with flashtile.replace_sdpa() as replacement:
        out = run()
    assert replacement.served == 0
    assert list(replacement.passed_on.values()) == [1]
    assert next(iter(replacement.passed_on)).startswith(reason)
    torch.testing.assert_close(out, want)


BAD = {
    "dtypes": lambda: F.scaled_dot_product_attention(leaf(1, 1, 4, 8), *(leaf(1, 1, 4, 8, dtype=torch.float32),) * 2),
    "shapes": lambda: F.scaled_dot_product_attention(leaf(2, 3, 5, 8), *(leaf(2, 3, 7, 9),) * 2),
    "mask-and-causal": lambda: attend(leaf(1, 4, 8), attn_mask=torch.ones(4, 4), is_causal=True),
    "mask-shape": lambda: attend(leaf(1, 1, 4, 8), attn_mask=torch.ones(4, 5)),
    "no-tensor": lambda: attend(3),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_call_is_pytorchs_to_report(name: str) -> None:
    with pytest.raises((RuntimeError, TypeError)) as theirs:
        BAD[name]()
    with flashtile.replace_sdpa() as replacement, pytest.raises(type(theirs.value)) as ours:
        BAD[name]()
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]
    assert sum(replacement.passed_on.values()) == 1


def test_a_backend_that_was_asked_for_is_obeyed_or_refused(calls: list[Any]) -> None:
    q = torch.randn(1, 2, 4, 8)
    with flashtile.replace_sdpa(), flashtile.use_backend("reference"):
        attend(q)
        with pytest.raises(NotImplementedError, match="triton"), flashtile.use_backend("triton"):
            attend(torch.randn(1, 2, 4, 8, dtype=torch.float64))
    assert calls[0].backend is None and len(calls) == 2


def encoder(layers: int = 2) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    return nn.TransformerEncoder(layer, layers)


PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])


@pytest.mark.parametrize("training", [False, True])
def test_transformer_encoder_runs_on_it(training: bool, calls: list[Any]) -> None:
    """Also in inference, where PyTorch would take a fast path of its own."""
    model, x = encoder().train(training), torch.randn(2, 6, 16, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    for options in ({}, {"src_key_padding_mask": PADDING}, {"mask": causal}, {"mask": causal, "is_causal": True}):
        with torch.set_grad_enabled(training):
            with flashtile.replace_sdpa() as replacement:
                out = model(x, **options)
            torch.backends.mha.set_fastpath_enabled(False)
            want = model(x, **options)
            torch.backends.mha.set_fastpath_enabled(True)
        close(out, want)
        assert replacement.served == len(calls) == 2 and not replacement.passed_on
        calls.clear()


def test_multihead_attention_and_decoder_run_on_it(calls: list[Any]) -> None:
    attention, x = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64), leaf(2, 6, 16)
    decoder = nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True, dtype=torch.float64)
    for module, options in ((attention, {"value": x, "need_weights": False}), (decoder, {})):
        want = module(x, x, **options)
        with flashtile.replace_sdpa():
            out = module(x, x, **options)
        close(out, want)
    assert len(calls) == 3
    with flashtile.replace_sdpa():
        attention(x, x, x)
    assert len(calls) == 3, "with need_weights=True PyTorch forms the weights and calls no attention"


def test_compiled_code_follows(calls: list[Any]) -> None:
    torch._dynamo.reset()
    compiled, q = torch.compile(attend, fullgraph=True, backend="aot_eager"), torch.randn(1, 2, 4, 8)
    graphs = []
    for replaced in (False, True, False, True):
        if replaced:
            with flashtile.replace_sdpa():
                graphs.append((compiled(q, is_causal=True), flashtile_runs(lambda: compiled(q, is_causal=True))))
        else:
            graphs.append((compiled(q, is_causal=True), flashtile_runs(lambda: compiled(q, is_causal=True))))
    assert [ran for _, ran in graphs] == [False, True, False, True]
    for out, _ in graphs:
        torch.testing.assert_close(out, attend(q, is_causal=True))


def flashtile_runs(call: Callable[[], Any]) -> bool:
    """Whether compiled code calls the op, seen by the profiler."""
    with torch.profiler.profile() as profile:
        call()
    return any("flashtile::forward" in event.name for event in profile.events())


LOWER_RIGHT = causal_lower_right(3, 4)


def below_the_diagonal(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:, :, 1:], q, q, LOWER_RIGHT)


@pytest.mark.parametrize("what", ["encoder", "lower-right", "too-wide", "other-kernel"])
def test_compiled_modules_and_what_is_passed_on(what: str) -> None:
    torch._dynamo.reset()
    functions: dict[str, tuple[Callable[[Tensor], Tensor], Tensor, bool]] = {
        "encoder": (encoder(1), torch.randn(2, 6, 16, dtype=torch.float64), True),
        "lower-right": (
            lambda q: F.scaled_dot_product_attention(q[:, :, 1:], q, q, LOWER_RIGHT),
            torch.randn(1, 2, 4, 8),
            True,
        ),
        "too-wide": (attend, torch.randn(1, 1, 4, 300), False),
        "other-kernel": (in_a_kernel_of_its_own, torch.randn(1, 2, 4, 8), False),
    }
    function, x, served = functions[what]
    with torch.no_grad() if what == "encoder" else torch.enable_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        want = function(x)
        torch.backends.mha.set_fastpath_enabled(True)
        with flashtile.replace_sdpa():
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), want)
            assert flashtile_runs(lambda: compiled(x)) == served


def test_nothing_is_copied(calls: list[Any]) -> None:
    q, k = torch.randn(2, 5, 3, 8).transpose(1, 2), torch.randn(2, 3, 7, 8)
    with flashtile.replace_sdpa():
        F.scaled_dot_product_attention(q, k, k)
    assert [t.data_ptr() for t in calls[0][:3]] == [t.data_ptr() for t in (q, k, k)]


def test_host_time_over_the_native_call(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 4, 1, 8)
    n = q.transpose(1, 2)
    with flashtile.replace_sdpa() as replacement:
        added = added_host_time(
            monkeypatch,
            lambda: flashtile.attention(n, n, n, causal=True),
            lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True),
        )
    assert replacement.served and added <= 15, f"{added:.1f} us"


def test_autocast_and_a_gradient_scaler() -> None:
    """Training in mixed precision, as with PyTorch's own attention."""
    losses = {}
    for name, context in (("pytorch", torch.enable_grad), ("flashtile", flashtile.replace_sdpa)):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
        optimizer, scaler = torch.optim.AdamW(layer.parameters(), 1e-2), torch.amp.GradScaler("cpu", init_scale=256.0)
        x, target = torch.randn(4, 6, 16), torch.randn(4, 6, 16)
        losses[name] = []
        with context():
            for _ in range(4):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.float16):
                    loss = (layer(x).float() - target).square().mean()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                losses[name].append(loss.item())
        assert scaler.get_scale() == 256.0
    assert losses["flashtile"] == pytest.approx(losses["pytorch"], rel=5e-3)
    assert losses["flashtile"][-1] < losses["flashtile"][0]


SUBPROCESS = """
import torch, flashtile
flashtile.replace_sdpa()
from torch.nn.functional import scaled_dot_product_attention as bound_later
q = torch.randn(1, 2, 4, 8)
print(bound_later.__module__)
"""


def test_a_name_bound_later_is_flashtiles() -> None:
    assert fresh_process(SUBPROCESS) == "flashtile.integrations.replace_sdpa"
