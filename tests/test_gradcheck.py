"""torch.autograd.gradcheck in float64: gradients against finite differences of the forward, formulas aside."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile.masks import Causal, Chunked, Prefix, Window

FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal with empty rows": {"q_len": 7, "k_len": 4, "causal": True},
    "window": {"mask": Window(2, 1)},
    "table": {"mask": Chunked(3, 1) & Prefix(2)},
    "grouped heads": {"heads": 4, "kv_heads": 2, "causal": True},
    "one key-value head": {"heads": 3, "kv_heads": 1, "v_dim": 5},
    "negative scale": {"scale": -0.7},
    "softcap": {"softcap": 1.5, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.3, 0.1])},
    "bias": {"bias": (2, 2, 5, 6)},
    "bias per head": {"bias": (1, 2, 5, 6), "causal": True},
    "bias per key": {"bias": (6,)},
    "bias with -inf": {"bias": (2, 1, 5, 6), "holes": True},
    "boolean bias": {"boolean": (2, 1, 5, 6)},
    "sinks": {"sinks": (2,), "mask": Window(1, 0)},
    "dropout": {"dropout_p": 0.4},
    "everything": {
        "heads": 4, "kv_heads": 2, "mask": Causal(), "softcap": 2.0, "bias": (1, 4, 5, 6), "sinks": (4,),
        "alibi_slopes": torch.rand(2, 4), "dropout_p": 0.3,
    },
}  # fmt: skip

backends = pytest.mark.parametrize("backend", ["reference", "blocked"])


def leaf(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@backends
@pytest.mark.parametrize("with_lse", [False, True], ids=["out", "out and lse"])
@pytest.mark.parametrize("name", FEATURES)
def test_dense(backend: str, name: str, with_lse: bool) -> None:
    features = dict(FEATURES[name])
    heads, kv_heads = features.pop("heads", 2), features.pop("kv_heads", None)
    q_len, k_len, v_dim = features.pop("q_len", 5), features.pop("k_len", 6), features.pop("v_dim", 4)
    kv_heads = heads if kv_heads is None else kv_heads
    inputs = [leaf(2, q_len, heads, 4), leaf(2, k_len, kv_heads, 4), leaf(2, k_len, kv_heads, v_dim)]
    names = [argument for argument in ("bias", "sinks") if argument in features]
    inputs += [leaf(*features.pop(argument)) for argument in names]
    holes = torch.rand(2, 1, 5, 6) < 0.3 if features.pop("holes", False) else None
    if "boolean" in features:
        features["bias"] = torch.rand(features.pop("boolean")) < 0.7

    def call(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)  # the same dropout in every evaluation
        learned = dict(zip(names, rest, strict=True))
        if holes is not None:
            learned["bias"] = learned["bias"].masked_fill(holes, -torch.inf)
        out, lse = flashtile.attention(q, k, v, return_lse=True, backend=backend, **features, **learned)
        finite_lse = lse.masked_fill(lse == -torch.inf, 0.0)
        return (out, finite_lse) if with_lse else (out,)

    assert torch.autograd.gradcheck(call, inputs)


@backends
def test_packed_sequences(backend: str) -> None:
    starts_q, starts_k = torch.tensor([0, 3, 3, 7]).int(), torch.tensor([0, 4, 6, 8]).int()
    inputs = (leaf(8, 2, 4), leaf(9, 1, 4), leaf(9, 1, 3), leaf(3, 2, 4, 4), leaf(2))

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = flashtile.attention_varlen(
            q, k, v, starts_q, starts_k, 4, 4, causal=True, bias=bias, sinks=sinks, return_lse=True, backend=backend
        )
        return out, lse[:, :7]  # behind the last sequence it is -inf

    assert torch.autograd.gradcheck(call, inputs)


def test_a_wrong_gradient_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    from flashtile.reference import standard

    backward = standard.backward

    def wrong(*arguments: Any) -> Any:
        result = backward(*arguments)
        arguments[6][1].mul_(1.01)
        return result

    monkeypatch.setattr("flashtile.reference.backward", wrong)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        test_dense("reference", "causal", False)
