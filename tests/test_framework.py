"""flashtile inside PyTorch: the op contract, derivatives, autocast, checkpointing, FLOP counts, modes, transforms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from process import fresh_process
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import flashtile
from flashtile.dispatch import load
from flashtile.problem import Call

FORWARD = torch.ops.flashtile.forward.default
BACKWARD = torch.ops.flashtile.backward.default


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def qkv(q_len: int = 5, k_len: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return leaf(2, q_len, 4, 8, dtype=dtype), leaf(2, k_len, 2, 8, dtype=dtype), leaf(2, k_len, 2, 6, dtype=dtype)


def offsets(*ends: int) -> Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


def random_state() -> Tensor:
    return torch.tensor([20220527, 3], dtype=torch.int64)


CALLS: dict[str, Callable[[], Call]] = {
    "plain": lambda: Call(*qkv()),
    "without-gradients": lambda: Call(*(t.detach() for t in qkv())),
    "bias-sinks-softcap": lambda: Call(*qkv(), leaf(4, 5, 7), None, leaf(4), window_right=1, softcap=5.0),
    "boolean-bias-alibi": lambda: Call(*qkv(), torch.rand(2, 1, 5, 7) > 0.3, torch.linspace(0.1, 0.4, 4)),
    "table": lambda: Call(*qkv(), lo=torch.zeros(1, 5).int(), hi=torch.arange(1, 6)[None].int()),
    "qkv-packed": lambda: Call(leaf(2, 5, 3, 4, 8), None, None, window_right=0),
    "kv-packed": lambda: Call(leaf(2, 5, 4, 8), leaf(2, 6, 2, 2, 8), None),
    "varlen": lambda: Call(
        leaf(9, 4, 8),
        leaf(10, 2, 8),
        leaf(10, 2, 8),
        cu_seqlens_q=offsets(2, 2, 9),
        cu_seqlens_k=offsets(3, 4, 10),
        max_seqlen_q=7,
        max_seqlen_k=6,
    ),
    "dropout": lambda: Call(*qkv(), rng=random_state(), dropout_p=0.5),
    "no-queries": lambda: Call(*qkv(q_len=0), sinks=leaf(4)),
    "no-keys": lambda: Call(*qkv(k_len=0), sinks=leaf(4)),
}


@pytest.mark.parametrize("name", CALLS)
def test_forward_op_keeps_its_contract(name: str) -> None:
    """Schema, fake kernel, autograd registration, and equality with itself under AOT tracing with dynamic shapes."""
    torch.library.opcheck(FORWARD, tuple(CALLS[name]()))


@pytest.mark.parametrize("name", CALLS)
def test_backward_op_keeps_its_contract(name: str) -> None:
    call = Call(*(t.detach() if isinstance(t, Tensor) else t for t in CALLS[name]()))
    out, lse = FORWARD(*call)
    bias_grad = call.bias is not None and call.bias.is_floating_point()
    dlse = torch.where(lse.isfinite(), torch.randn_like(lse), 0.0)
    torch.library.opcheck(BACKWARD, (torch.randn_like(out), dlse, out, lse, bias_grad, *call))


def test_opcheck_rejects_a_wrong_fake_kernel() -> None:
    with torch.library._scoped_library("flashtile_wrong", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        torch.library.register_fake("flashtile_wrong::twice", lambda x: x.new_empty(1), lib=library)
        with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
            torch.library.opcheck(torch.ops.flashtile_wrong.twice.default, (torch.randn(3),))


@pytest.mark.parametrize("through_op", [False, True], ids=["eager", "op"])
@pytest.mark.parametrize("name", ["plain", "bias-sinks-softcap", "qkv-packed", "varlen", "dropout", "no-keys"])
def test_thin_path_and_op_agree_bitwise(name: str, through_op: bool) -> None:
    call = CALLS[name]()._replace(deterministic=True)
    fields = [t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in call]
    out, lse = (FORWARD if through_op else lambda *a: flashtile.ops.attention(Call(*a)))(*fields)
    leaves = [t for t in fields if isinstance(t, Tensor) and t.requires_grad]
    grads = torch.autograd.grad(out.square().sum() + lse[lse.isfinite()].sum(), leaves)

    expected_out, expected_lse = FORWARD(*call)
    expected_leaves = [t for t in call if isinstance(t, Tensor) and t.requires_grad]
    loss = expected_out.square().sum() + expected_lse[expected_lse.isfinite()].sum()
    expected = torch.autograd.grad(loss, expected_leaves)
    assert torch.equal(out, expected_out)
    assert torch.equal(lse, expected_lse)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_only_asked_gradients_come_back() -> None:
    q, k, v = qkv()
    flashtile.attention(q, k.detach(), v).sum().backward()
    assert q.grad is not None
    assert k.grad is None
    assert v.grad is not None


def test_gradient_through_lse_alone() -> None:
    q, k, v = qkv()
    _, lse = flashtile.attention(q, k, v, return_lse=True)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k.repeat_interleave(2, 2)) / 8**0.5
    expected = torch.autograd.grad(scores.logsumexp(-1).sum(), (q, k))
    torch.testing.assert_close((dq, dk), expected)
    assert not dv.any()


@pytest.mark.parametrize("through_op", [False, True], ids=["eager", "op"])
def test_second_derivative_is_refused(through_op: bool) -> None:
    q, k, v = qkv()
    out = FORWARD(*Call(q, k, v))[0] if through_op else flashtile.attention(q, k, v)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradient of attention's gradient"):
        torch.autograd.grad(dq.sum(), q)


def test_create_graph_without_a_second_derivative_works() -> None:
    q, k, v = qkv()
    (first,) = torch.autograd.grad(flashtile.attention(q, k, v).sum(), q)
    (second,) = torch.autograd.grad(flashtile.attention(q, k, v).sum(), q, create_graph=True)
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode: Callable[[], Any]) -> None:
    q, k, v = qkv()
    expected = flashtile.attention(q, k, v, causal=True)
    with mode():
        out = flashtile.attention(q, k, v, causal=True)
        assert out.grad_fn is None
    assert torch.equal(out, expected)


def test_inference_tensors_work_outside_of_their_mode() -> None:
    with torch.inference_mode():
        q, k, v = (t.detach().clone() for t in qkv())
    assert flashtile.attention(q, k, v).shape == (2, 5, 4, 6)


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("given", FLOATS, ids=str)
@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_as_pytorch_does(autocast: torch.dtype, given: torch.dtype) -> None:
    q, k, v = qkv(dtype=given)
    with torch.autocast("cpu", autocast):
        out = flashtile.attention(q, k, v)
        expected = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), enable_gqa=True)
    assert out.dtype == expected.dtype
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq.dtype == given
    cast = [t.to(out.dtype) for t in (q, k, v)]
    assert torch.equal(out, flashtile.attention(*cast))


def test_autocast_brings_mixed_inputs_together() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = flashtile.attention(q, k.bfloat16(), v.bfloat16(), bias=torch.randn(5, 7))
    assert out.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="k: got torch.bfloat16"):
        flashtile.attention(q, k.bfloat16(), v.bfloat16())


@pytest.fixture
def forward_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time the blocked backend computes a forward."""
    runs: list[str] = []
    backend = load("blocked")
    forward = backend.forward

    def counted(problem: Any, *arguments: Any) -> Any:
        runs.append(str(problem))
        return forward(problem, *arguments)

    monkeypatch.setattr(backend, "forward", counted)
    return runs


def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flashtile.attention(q.sin(), k, v, dropout_p=0.25, backend="blocked").cos()


def layer_gradients(run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(5)
    inputs = qkv()
    run(layer, *inputs).sum().backward()
    return tuple(t.grad for t in inputs)


def must_save_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op == FORWARD else CheckpointPolicy.PREFER_RECOMPUTE


def selective(policy: Any) -> Callable[..., Tensor]:
    return partial(checkpoint, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy))


@pytest.mark.parametrize(
    ("run", "forwards"),
    [
        (partial(checkpoint, use_reentrant=True), 2),
        (partial(checkpoint, use_reentrant=False), 2),
        (selective(lambda ctx, op, *args, **kwargs: CheckpointPolicy.PREFER_RECOMPUTE), 2),
        (selective([FORWARD]), 1),
        (selective(must_save_attention), 1),
    ],
    ids=["reentrant", "non-reentrant", "recompute-all", "save-by-op", "save-by-policy"],
)
def test_activation_checkpointing(forward_runs: list[str], run: Callable[..., Tensor], forwards: int) -> None:
    """Saved by op, the forward runs once; dropout recomputed in the second forward is the same dropout."""
    expected = layer_gradients(lambda f, *inputs: f(*inputs))
    forward_runs.clear()
    grads = layer_gradients(run)
    assert len(forward_runs) == forwards
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def flops(run: Callable[[], Any]) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        run()
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


def test_flop_counts_are_those_of_pytorch_attention() -> None:
    q, k, v = (leaf(2, 16, 4, 8) for _ in range(3))
    counts = flops(lambda: flashtile.attention(q, k, v).sum().backward())
    shape = (2, 4, 16, 8)
    assert counts == {
        "flashtile.forward": sdpa_flop_count(shape, shape, shape),
        "flashtile.backward": sdpa_backward_flop_count(shape, shape, shape, shape),
    }


def test_flop_counts_of_packed_and_unequal_forms() -> None:
    product = 2 * 2 * 4 * 5
    dims = flops(lambda: flashtile.attention(*qkv(5, 7)))
    assert dims == {"flashtile.forward": product * 7 * (8 + 6)}
    assert flops(lambda: FORWARD(*CALLS["qkv-packed"]())) == {"flashtile.forward": product * 5 * 16}
    assert flops(lambda: FORWARD(*CALLS["kv-packed"]())) == {"flashtile.forward": product * 6 * 16}
    assert flops(lambda: FORWARD(*CALLS["varlen"]())) == {"flashtile.forward": 2 * 9 * 4 * 6 * 16}


@pytest.mark.parametrize("order", ["counter, flashtile", "flashtile, counter"])
def test_flop_formulas_whatever_is_imported_first(order: str) -> None:
    code = f"""
import torch
for name in "{order}".split(", "):
    __import__({{"counter": "torch.utils.flop_counter", "flashtile": "flashtile"}}[name])
from torch.utils.flop_counter import flop_registry
print(sorted(str(op) for op in flop_registry if "flashtile" in str(op)))
"""
    assert fresh_process(code) == "['flashtile.backward', 'flashtile.forward']"


def test_deterministic_algorithms_reach_the_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    backend = load("blocked")
    forward = backend.forward
    monkeypatch.setattr(
        backend, "forward", lambda problem, *a: seen.append(problem.deterministic) or forward(problem, *a)
    )
    inputs = qkv()
    flashtile.attention(*inputs, backend="blocked")
    torch.use_deterministic_algorithms(True)
    flashtile.attention(*inputs, backend="blocked")
    flashtile.attention(*inputs, backend="blocked", deterministic=False)
    assert seen == [False, True, False]


def test_deterministic_backward_repeats_bitwise() -> None:
    q, k, v = qkv(33, 65)
    torch.use_deterministic_algorithms(True)
    runs = [torch.autograd.grad(flashtile.attention(q, k, v).sum(), (q, k, v)) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def squared(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return flashtile.attention(q, k, v, **options).square().sum()


def per_sample(function: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([function(*sample) for sample in zip(q, k, v, strict=True)])


def batches() -> tuple[Tensor, Tensor, Tensor]:
    """Three problems, the vmapped dimension first."""
    return torch.randn(3, 2, 5, 4, 8), torch.randn(3, 2, 7, 2, 8), torch.randn(3, 2, 7, 2, 6)


OPTIONS: dict[str, dict[str, Any]] = {
    "folded": {"causal": True},
    "looped-by-bias": {"bias": torch.linspace(-1, 1, 35).view(5, 7)},
    "looped-by-sinks": {"sinks": torch.linspace(-1, 1, 4)},
    "folded-table": {"mask": flashtile.masks.Chunked(3)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_vmap_and_per_sample_gradients(options: dict[str, Any]) -> None:
    q, k, v = batches()
    attend = partial(flashtile.attention, **options)
    torch.testing.assert_close(torch.vmap(attend)(q, k, v), per_sample(attend, q, k, v))
    gradient = torch.func.grad(partial(squared, **options))
    torch.testing.assert_close(torch.vmap(gradient)(q, k, v), per_sample(gradient, q, k, v))

    leaves = q[0].clone().requires_grad_(), k[0], v[0]
    expected = torch.autograd.grad(squared(*leaves, **options), leaves[0])[0]
    torch.testing.assert_close(gradient(q[0], k[0], v[0]), expected)


def test_vmap_over_other_dimensions_and_shared_inputs() -> None:
    q, k, v = batches()
    expected = torch.stack([flashtile.attention(one, k[0], v[0]) for one in q])
    mapped = torch.vmap(flashtile.attention, in_dims=(1, None, None), out_dims=2)(q.movedim(0, 1), k[0], v[0])
    torch.testing.assert_close(mapped, expected.movedim(0, 2))
    biased = torch.vmap(lambda bias: flashtile.attention(q[0], k[0], v[0], bias=bias))(torch.randn(3, 5, 7))
    assert biased.shape == (3, 2, 5, 4, 6)


def test_vmap_rules_dropout_by_its_randomness() -> None:
    q, k, v = (t[:1].expand(4, *t.shape[1:]) for t in batches())
    attend = partial(flashtile.attention, dropout_p=0.5)
    same = torch.vmap(attend, randomness="same")(q, k, v)
    assert torch.equal(same[0], same[3])
    different = torch.vmap(attend, randomness="different")(q, k, v)
    assert not torch.equal(different[0], different[3])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(attend)(q, k, v)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_is_refused() -> None:
    q, k, v = (t.detach() for t in qkv())
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: flashtile.attention(x, k, v), (q,), (q,))
    with torch.autograd.forward_ad.dual_level():
        with pytest.raises(NotImplementedError, match="jvp"):
            flashtile.attention(torch.autograd.forward_ad.make_dual(q, q), k, v)
        assert torch.equal(flashtile.attention(q, k, v), flashtile.attention(q, k, v))


def test_fake_and_meta_tensors_give_shapes() -> None:
    meta = [t.detach().to("meta") for t in qkv()]
    out, lse = flashtile.attention(*meta, return_lse=True)
    assert (out.device.type, out.shape, lse.shape, lse.dtype) == ("meta", (2, 5, 4, 6), (2, 4, 5), torch.float32)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = flashtile.attention(*(mode.from_tensor(t) for t in qkv()))
    assert fake.shape == (2, 5, 4, 6)


def test_state_of_use_backend_is_kept_for_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    for name in ("blocked", "reference"):
        backend = load(name)
        run = partial(lambda name, backward, *a: served.append(name) or backward(*a), name, backend.backward)
        monkeypatch.setattr(backend, "backward", run)
    q, k, v = qkv()
    with flashtile.use_backend("reference"):
        out = flashtile.attention(q, k, v)
    out.sum().backward()
    assert served == ["reference"]
