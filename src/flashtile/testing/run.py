"""Runs a case on a backend and measures it against the float64 oracle: pytest, `verify` and `bench` all call this."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import flashtile
from flashtile.dropout import draw
from flashtile.testing import accuracy, plain
from flashtile.testing.cases import Case
from flashtile.testing.inputs import Inputs, build
from flashtile.testing.magnitudes import gradient_inputs, magnitudes
from flashtile.testing.poison import poisoned

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Report:
    """The errors of one case on one backend, one per result: out, lse, and each gradient that the case has."""

    case: Case
    backend: str
    dtype: torch.dtype
    device: str
    errors: tuple[accuracy.Error, ...]

    @property
    def share(self) -> float:
        """The most that any result uses of its error budget; at most 1."""
        return max(error.share for error in self.errors)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.case.id} on {self.backend}, {dtype}, {self.device}: {self.share:.0%} of the error budget"


def run_case(
    case: Case, backend: str, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0, grads: bool = True
) -> Report:
    """Computes a case forward and backward, and checks every result.

    Args:
        case: from `cases.CASES`, `real_cases.REAL_CASES` or one's own.
        backend: the name that the call asks for.
        seed: chooses the values; equal seeds give equal inputs everywhere.
        grads: False leaves the backward out.

    Raises:
        WrongResultError: a result outside of its error budget, or of a wrong shape, dtype or non-finite pattern.
        NotImplementedError: the backend cannot serve the case.
    """
    inputs = build(case, dtype, device, seed)
    with poisoned():
        results = evaluate(case, inputs, backend, grads)
    errors = compare(case, inputs, results)
    accuracy.check(*errors)
    return Report(case, backend, dtype, str(device), errors)


def compare(case: Case, inputs: Inputs, results: Results) -> tuple[accuracy.Error, ...]:
    """The error of each result, out, lse or gradient, of a case; see `accuracy.measure` for what it raises."""
    wide, grads = inputs.in_float64(), len(results) > 2
    exact = evaluate(case, wide, "reference", grads)
    yardstick = evaluate(case, inputs, None, grads)
    computed, stored = magnitudes(case, wide, random_state(case, inputs))
    units = [accuracy.unit_roundoff(t.dtype) for t in (results["lse"], inputs.q)]
    sizes = {name: accuracy.Sizes(units[0] * computed[name], units[1] * stored[name]) for name in results}
    return tuple(
        accuracy.measure(name, result, exact[name], yardstick[name], sizes[name]) for name, result in results.items()
    )


def evaluate(case: Case, inputs: Inputs, backend: str | None, grads: bool = True) -> Results:
    """out, lse and the gradients that the case has: dq, dk, dv, dbias, dsinks. backend None is plain PyTorch."""
    leaves = {name: t.detach().requires_grad_(grads) for name, t in gradient_inputs(inputs).items()}
    fields = {"dq": "q", "dk": "k", "dv": "v", "dbias": "bias", "dsinks": "sinks"}
    inputs = inputs._replace(**{fields[name]: leaf for name, leaf in leaves.items()})  # type: ignore[arg-type]
    if backend is None:
        out, lse = plain.attention(case, inputs, random_state(case, inputs))
    else:
        out, lse = call(case, inputs, backend)
    results = {"out": out.detach(), "lse": lse.detach()}
    if not grads:
        return results
    outputs, upstream = [out], [inputs.dout]
    if inputs.dlse is not None:
        outputs, upstream = [out, lse], [inputs.dout, inputs.dlse]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, materialize_grads=True)
    return results | dict(zip(leaves, gradients, strict=True))


def call(case: Case, inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    """(out, lse) of the case through the native call."""
    torch.manual_seed(inputs.seed)
    features = {
        "mask": case.mask,
        "scale": case.scale,
        "softcap": case.softcap,
        "alibi_slopes": inputs.alibi_slopes,
        "bias": inputs.bias,
        "sinks": inputs.sinks,
        "dropout_p": case.dropout_p,
        "deterministic": case.deterministic,
        "return_lse": True,
        "backend": backend,
    }
    if not case.varlen:
        return flashtile.attention(inputs.q, inputs.k, inputs.v, **features)  # type: ignore[return-value, arg-type]
    longest_q, longest_k = (max(pair[side] for pair in case.lengths) for side in (0, 1))
    starts = (inputs.cu_seqlens_q, inputs.cu_seqlens_k, longest_q, longest_k)
    return flashtile.attention_varlen(inputs.q, inputs.k, inputs.v, *starts, **features)  # type: ignore[return-value, arg-type]


def random_state(case: Case, inputs: Inputs) -> Tensor | None:
    """The dropout state that `call` draws for these inputs."""
    if case.dropout_p == 0:
        return None
    torch.manual_seed(inputs.seed)
    return draw(inputs.q.device)
