"""Named cases, their inputs, and the error budget that every backend is held to; part of the product.

>>> import torch
>>> from flashtile.testing import case, run_case
>>> print(run_case(case("gqa-causal-odd"), "reference", torch.float32).share <= 1)
True
"""

from __future__ import annotations

from flashtile.testing.accuracy import Error, WrongResultError
from flashtile.testing.cases import CASES, Case, case
from flashtile.testing.inputs import Inputs, build
from flashtile.testing.poison import poisoned
from flashtile.testing.real_cases import REAL_CASES
from flashtile.testing.run import Report, evaluate, run_case

__all__ = [
    "CASES",
    "REAL_CASES",
    "Case",
    "Error",
    "Inputs",
    "Report",
    "WrongResultError",
    "build",
    "case",
    "evaluate",
    "poisoned",
    "run_case",
]
