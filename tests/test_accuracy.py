"""The checkers can say no: every kind of mistake that a backend could make is caught by run_case, and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.backends import blocked
from flashtile.problem import Call, Problem
from flashtile.reference import standard
from flashtile.testing import Case, WrongResultError, case, run_case
from flashtile.testing.accuracy import Error, Sizes, check, measure

EXACT = torch.tensor([[1.0, -2.0], [3.0, 100.0]], dtype=torch.float64)
NOTHING_ELSE = Sizes(torch.zeros(()), torch.zeros(()))


def error_of(result: Tensor, exact: Tensor = EXACT) -> Error:
    return measure("out", result, exact, exact.to(result.dtype), NOTHING_ELSE)


def test_rounding_is_accepted() -> None:
    values = torch.randn(100, dtype=torch.float64)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check(error_of(values.to(dtype), values))


def test_a_wrong_element_is_rejected_with_its_place() -> None:
    wrong = EXACT.float().clone()
    wrong[1, 0] += 1e-3
    with pytest.raises(WrongResultError, match=r"out: error 0\.001 at \(1, 0\), allowed"):
        check(error_of(wrong))


def test_a_broad_small_error_is_rejected_by_its_mean() -> None:
    """Below the budget of the maximum, which the one large element sets, but in every element."""
    values = torch.ones(1000, dtype=torch.float64)
    values[0] = 1000.0
    error = error_of((values + 2e-5).float(), values)
    assert error.worst < error.allowed
    assert error.share > 1
    with pytest.raises(WrongResultError, match="rms"):
        check(error)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_are_rejected_where_the_oracle_has_none(wrong: float) -> None:
    result = EXACT.float().clone()
    result[0, 1] = wrong
    with pytest.raises(WrongResultError, match=r"differs in 1 of 4 elements, first at \(0, 1\)"):
        error_of(result)


@pytest.mark.parametrize(("right", "wrong"), [(torch.nan, 1.0), (torch.inf, -torch.inf), (-torch.inf, torch.nan)])
def test_non_finite_values_are_required_where_the_oracle_has_them(right: float, wrong: float) -> None:
    exact, result = EXACT.clone(), EXACT.float().clone()
    exact[1, 1], result[1, 1] = right, right
    check(error_of(result, exact))
    result[1, 1] = wrong
    with pytest.raises(WrongResultError, match=r"first at \(1, 1\)"):
        error_of(result, exact)


def test_shape_and_dtype_are_checked() -> None:
    plain = EXACT.float()
    with pytest.raises(WrongResultError, match="out: shape"):
        measure("out", EXACT.float()[:1], EXACT, plain, NOTHING_ELSE)
    with pytest.raises(WrongResultError, match="out: dtype torch.float16, expected torch.float32"):
        measure("out", EXACT.half(), EXACT, plain, NOTHING_ELSE)


def test_an_overflow_of_plain_pytorch_allows_nothing() -> None:
    plain, wrong = EXACT.float().clone(), EXACT.float().clone()
    plain[0, 0], wrong[0, 0] = torch.inf, 1.5
    with pytest.raises(WrongResultError):
        check(measure("out", wrong, EXACT, plain, NOTHING_ELSE))


Forward = Callable[[Problem, Call, Tensor | None], tuple[Tensor, Tensor]]


def calling_with(change: Callable[[Problem, Call], tuple[Problem, Call]]) -> dict[str, Any]:
    """A backend that computes another call than it was asked for, forward and backward alike."""

    def forward(problem: Problem, call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return standard.forward(*change(problem, call), out)

    def backward(problem: Problem, call: Call, *rest: Any) -> tuple[Tensor | None, Tensor | None]:
        return standard.backward(*change(problem, call), *rest)

    return {"forward": forward, "backward": backward}


def in_call(**changes: Callable[[Any], Any]) -> dict[str, Any]:
    return calling_with(lambda p, c: (p, c._replace(**{name: f(getattr(c, name)) for name, f in changes.items()})))


def in_problem(**changes: Callable[[Any], Any]) -> dict[str, Any]:
    return calling_with(lambda p, c: (replace(p, **{name: f(getattr(p, name)) for name, f in changes.items()}), c))


def after_forward(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> dict[str, Any]:
    return {"forward": lambda *args: change(*standard.forward(*args))}


def after_backward(change: Callable[..., None]) -> dict[str, Any]:
    """change(problem, grads) in place."""

    def backward(problem: Problem, *rest: Any) -> tuple[Tensor | None, Tensor | None]:
        result = standard.backward(problem, *rest)
        change(problem, rest[5])
        return result

    return {"backward": backward}


def of_sums(change: Callable[[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]) -> dict[str, Any]:
    return {"backward": lambda *args: change(*standard.backward(*args))}


def without_dlse(problem: Problem, call: Call, out: Tensor, lse: Tensor, dout: Tensor, dlse: Any, *rest: Any) -> Any:
    return standard.backward(problem, call, out, lse, dout, None, *rest)


def in_tf32(tensor: Tensor) -> Tensor:
    """The ten bits of mantissa that TF32 multiplies with."""
    return (tensor.view(torch.int32) & ~0x1FFF).view(torch.float32)


def another_state(rng: Tensor) -> Tensor:
    return rng + torch.tensor([0, 1])


MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "diagonal off by one": ("causal", in_call(window_right=lambda right: right + 1), "out"),
    "window off by one": ("window-both", in_call(window_left=lambda left: left - 1), "out"),
    "one row of the table off by one": (
        "documents-causal",
        in_call(hi=lambda hi: hi - (torch.arange(hi.shape[1]) == 77).int()),
        "out",
    ),
    "scale one percent off": ("square-63", in_problem(scale=lambda scale: 1.01 * scale), "out"),
    "softcap forgotten": ("softcap", in_problem(softcap=lambda cap: 0.0), "out"),
    "slopes of the wrong head": ("alibi", in_call(alibi_slopes=lambda slopes: slopes.flip(0)), "out"),
    "bias of the wrong batch entry": ("bias-batch", in_call(bias=lambda bias: bias.flip(0)), "out"),
    "one hidden pair seen": (
        "boolean",
        in_call(bias=lambda bias: bias | (torch.arange(bias.numel()).view(bias.shape) == 70)),
        "out",
    ),
    "sinks a thousandth off": ("sinks", in_call(sinks=lambda sinks: sinks + 1e-3), "out"),
    "another dropout state": ("dropout", in_call(rng=another_state), "out"),
    "dropout not rescaled": ("dropout", after_forward(lambda out, lse: (out * 0.9, lse)), "out"),
    "TF32 products": ("square-64", in_call(q=in_tf32, k=in_tf32), "out"),
    "values rounded to half precision": ("square-64", in_call(v=lambda v: v.half().float()), "out"),
    "lse in base 2": ("causal", after_forward(lambda out, lse: (out, lse * 1.442695)), "lse"),
    "lse zero in an empty row": (
        "causal-many-queries",
        after_forward(lambda out, lse: (out, lse.nan_to_num(neginf=0.0))),
        "lse",
    ),
    "last row not written": (
        "odd-111",
        after_forward(lambda out, lse: (out.index_fill(1, torch.tensor([110]), torch.nan), lse)),
        "out",
    ),
    "key-value heads swapped": ("gqa", in_call(v=lambda v: v.flip(2)), "out"),
    "dq without the scale": ("causal", after_backward(lambda problem, grads: grads[0].div_(problem.scale)), "dq"),
    "dk of one row forgotten": ("odd-111", after_backward(lambda problem, grads: grads[1][:, 110].zero_()), "dk"),
    "dv of one query head only": ("gqa", after_backward(lambda problem, grads: grads[2].mul_(0.5)), "dv"),
    "the gradient of lse forgotten": ("causal", {"backward": without_dlse}, "dq"),
    "the gradient of bias not summed": ("bias-heads", of_sums(lambda dbias, dsinks: (dbias / 3, dsinks)), "dbias"),
    "the gradient of sinks with the wrong sign": ("sinks", of_sums(lambda dbias, dsinks: (dbias, -dsinks)), "dsinks"),
    "rows behind the last sequence left over": (
        "varlen-trailing",
        after_backward(lambda problem, grads: grads[1][-1].fill_(torch.nan)),
        "dk",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_backend_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each was seen to pass without its mistake: the same backend, unchanged, is run first."""
    case_id, functions, wrong_result = MISTAKES[name]
    for function in ("forward", "backward"):
        monkeypatch.setattr(blocked, function, getattr(standard, function))
    run_case(case(case_id), "blocked", torch.float32)
    for function, mistaken in functions.items():
        monkeypatch.setattr(blocked, function, mistaken)
    with pytest.raises(WrongResultError) as caught:
        run_case(case(case_id), "blocked", torch.float32)
    assert f"{wrong_result}: " in str(caught.value)


def test_precision_lost_in_half_precision_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every input one unit of the last place too large: a loss of precision, not a wrong formula."""

    def forward(problem: Problem, call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        coarser = [(t.float() * (1 + 2**-7)).bfloat16() for t in (call.q, call.k, call.v)]
        return standard.forward(problem, call._replace(q=coarser[0], k=coarser[1], v=coarser[2]), out)

    monkeypatch.setattr(blocked, "forward", forward)
    monkeypatch.setattr(blocked, "backward", standard.backward)
    with pytest.raises(WrongResultError, match="out: "):
        run_case(case("square-64"), "blocked", torch.bfloat16)


def test_memory_that_was_never_written_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(problem: Problem, call: Call, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        result, lse = standard.forward(problem, call, out)
        unwritten = torch.empty_like(result)
        unwritten[:, :-1] = result[:, :-1]
        return unwritten, lse

    monkeypatch.setattr(blocked, "forward", forward)
    with pytest.raises(WrongResultError, match="NaN differs"):
        run_case(case("square-64"), "blocked", torch.float32)


def test_reports_print_themselves() -> None:
    report = run_case(Case("a-case", "", q_len=8, k_len=8), "reference", torch.float32)
    assert str(report).startswith("a-case on reference, float32, cpu: ")
    assert [error.name for error in report.errors] == ["out", "lse", "dq", "dk", "dv"]
    assert 0 < report.share <= 1
