"""Softmax that does not overflow, and softmax of a row that is seen in two parts.

Safe softmax of x subtracts the maximum m(x) first:

    m(x) = max_i x_i      f(x) = exp(x - m(x))      l(x) = sum_i f(x)_i      softmax(x) = f(x) / l(x)

For a row in two parts x = [a, b] the same statistics follow from those of the parts (Dao et al. 2022, "FlashAttention",
section 3.1; Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3):

    m(x) = max(m(a), m(b))      l(x) = exp(m(a) - m(x)) l(a) + exp(m(b) - m(x)) l(b)

so attention can read its keys part by part and never hold a whole row. Softmax has no part that sees nothing: m is
-inf there, f and l are 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Part(NamedTuple):
    """What softmax needs to remember of the keys seen so far; o is the weighted sum of values, not divided."""

    m: Tensor  # [rows, 1]
    l: Tensor  # [rows, 1]
    o: Tensor  # [rows, dim]


def statistics(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, f and l of each row of scores [rows, keys]."""
    m = s.amax(-1, keepdim=True)
    f = torch.exp(s - finite(m))
    return m, f, f.sum(-1, keepdim=True)


def safe_softmax(s: Tensor) -> Tensor:
    """softmax of each row; 0 where a row is -inf throughout."""
    _, f, l = statistics(s)
    return f / nonzero(l)


def attend(s: Tensor, v: Tensor) -> Part:
    """The state after one part of the keys: scores [rows, keys] and values [keys, dim]."""
    m, f, l = statistics(s)
    return Part(m, l, f @ v)


def merge(a: Part, b: Part) -> Part:
    """The state after both parts, in either order."""
    m = torch.maximum(a.m, b.m)
    shrink_a, shrink_b = torch.exp(a.m - finite(m)), torch.exp(b.m - finite(m))
    return Part(m, shrink_a * a.l + shrink_b * b.l, shrink_a * a.o + shrink_b * b.o)


def finish(part: Part) -> tuple[Tensor, Tensor]:
    """(O, L): the one division at the end, and L = m + log l, the logarithm of the row's denominator."""
    return part.o / nonzero(part.l), (part.m + torch.log(part.l)).squeeze(-1)


def finite(m: Tensor) -> Tensor:
    """m with 0 for -inf, so that exp(-inf - m) is 0 and not NaN in a row that has seen nothing."""
    return torch.where(m == -torch.inf, 0.0, m)


def nonzero(l: Tensor) -> Tensor:
    """l with 1 for 0: a row that sees nothing has O = 0 / 1."""
    return torch.where(l == 0, 1.0, l)
