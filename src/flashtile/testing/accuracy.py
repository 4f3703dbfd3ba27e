"""The error budget: how far a result may be from the exact one, and the checkers that raise where it is farther.

Against the float64 oracle, the error of out, lse and each gradient, its maximum and its root mean square, is at most

    2 * (error of plain PyTorch attention in the same dtype)
      + u_result * exact, u_input * `stored`        one rounding of the result, and of what is held in the inputs' dtype
      + STEPS * u_compute * `computed`              one rounding in each step of the computation

where u is the unit roundoff of a dtype, the computing dtype is float32 (float64 for float64 inputs), and `magnitudes`
says how far roundings move each element. These two terms matter where plain PyTorch is exact by luck, as in a softmax
over one key. Infinities and NaNs must stand where the oracle's stand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

PLAIN_FACTOR = 2.0

# Scores, softmax, the product with the values, the result (or, backward: dP, dS, the product, the result).
STEPS = 4.0


class WrongResultError(AssertionError):
    """A result outside of its error budget; the text says which, by how much and where."""


@dataclass(frozen=True)
class Error:
    """The error of one result.

    worst, plain: largest absolute error of the result and of plain PyTorch; allowed: the budget of worst. rms,
    rms_allowed: root mean square and its budget. place: index of the worst element.
    """

    name: str
    worst: float
    plain: float
    allowed: float
    rms: float
    rms_allowed: float
    place: tuple[int, ...]

    @property
    def share(self) -> float:
        """How much of the budget is used; above 1 the result is wrong."""
        return max(_share(self.worst, self.allowed), _share(self.rms, self.rms_allowed))

    def __str__(self) -> str:
        return (
            f"{self.name}: error {self.worst:.3g} at {self.place}, allowed {self.allowed:.3g} "
            f"(plain PyTorch {self.plain:.3g}); rms {self.rms:.3g}, allowed {self.rms_allowed:.3g}"
        )


class Sizes(NamedTuple):
    """Per element: how far one rounding of every computed value, and of every stored one, moves a result (float64)."""

    computed: Tensor
    stored: Tensor


def measure(name: str, result: Tensor, exact: Tensor, plain: Tensor, sizes: Sizes) -> Error:
    """The error of a result and its budget. exact is float64; plain has the result's dtype.

    Raises WrongResultError where shapes or dtypes differ, or where non-finite values stand in other places.
    """
    check_same_form(name, result, plain)
    check_same_nonfinite(name, result, exact)
    if exact.numel() == 0:
        return Error(name, 0.0, 0.0, 0.0, 0.0, 0.0, ())
    finite = torch.isfinite(exact)
    error = _distance(result, exact, finite)
    # Where plain PyTorch itself overflows it says nothing about what is possible.
    plain_error = _distance(plain, exact, finite & torch.isfinite(plain))
    terms = (
        PLAIN_FACTOR * plain_error,
        torch.where(finite, torch.hypot(unit_roundoff(result.dtype) * exact, sizes.stored), 0.0),
        torch.where(finite, STEPS * sizes.computed, 0.0),
    )
    return Error(
        name,
        worst=_largest(error),
        plain=_largest(plain_error),
        allowed=sum(map(_largest, terms)),
        rms=_rms(error),
        rms_allowed=sum(map(_rms, terms)),
        place=_place_of_largest(error),
    )


def check(*errors: Error) -> None:
    """Raises WrongResultError that names every result outside of its budget."""
    wrong = [str(error) for error in errors if not error.share <= 1]
    if wrong:
        raise WrongResultError("; ".join(wrong))


def check_same_form(name: str, result: Tensor, expected: Tensor) -> None:
    """Raises WrongResultError where shape or dtype differ."""
    for what in ("shape", "dtype"):
        got, wanted = getattr(result, what), getattr(expected, what)
        if got != wanted:
            raise WrongResultError(f"{name}: {what} {got}, expected {wanted}")


def check_same_nonfinite(name: str, result: Tensor, exact: Tensor) -> None:
    """Raises WrongResultError unless NaN, inf and -inf stand exactly where the exact result has them."""
    for kind, found in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = found(result) != found(exact)
        if bool(differs.any()):
            place = tuple(differs.nonzero()[0].tolist())
            count = int(differs.sum())
            raise WrongResultError(
                f"{name}: {kind} differs in {count} of {differs.numel()} elements, first at {place}: "
                f"got {result[place].item()}, expected {exact[place].item()}"
            )


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def _distance(values: Tensor, exact: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, values.double() - exact, 0.0).abs()


def _largest(values: Tensor) -> float:
    return float(values.max())


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _place_of_largest(values: Tensor) -> tuple[int, ...]:
    place = torch.unravel_index(values.argmax(), values.shape)
    return tuple(int(index) for index in place)


def _share(error: float, allowed: float) -> float:
    if error == 0:
        return 0.0
    return error / allowed if allowed > 0 else math.inf
