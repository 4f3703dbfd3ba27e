"""FLOP formulas of the two ops for torch.utils.flop_counter, counted as PyTorch counts its own attention.

Importing that module imports Triton, so the formulas wait: they are registered when it is first imported, or at once
where it already was.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

COUNTER = "torch.utils.flop_counter"
_LENGTHS = slice(8, 10)  # max_seqlen_q, max_seqlen_k among the op's arguments after q, k, v


def register() -> None:
    """Registers the formulas of `flashtile::forward` and `flashtile::backward`, now or with the counter's import."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenCounterIsImported())


def _register(counter: ModuleType) -> None:
    counter.register_flop_formula(torch.ops.flashtile.forward)(forward)
    counter.register_flop_formula(torch.ops.flashtile.backward)(backward)


class _WhenCounterIsImported(MetaPathFinder):
    """Steps aside at the first import of the counter and registers the formulas once its module has run."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec


def forward(q: Any, k: Any, v: Any, *rest: Any, **kwargs: Any) -> int:
    """S = Q K^T and O = P V, two FLOPs a multiply-add; masks are not deducted. Arguments are shapes."""
    scores, values = _products(q, k, v, *rest[_LENGTHS])
    return 2 * (scores + values)


def backward(dout: Any, dlse: Any, out: Any, lse: Any, bias_grad: Any, *call: Any, **kwargs: Any) -> int:
    """S again, dQ and dK from dS, dP and dV: three products of the score kind, two of the value kind."""
    scores, values = _products(*call[:3], *call[3:][_LENGTHS])
    return 2 * (3 * scores + 2 * values)


def _products(q: Any, k: Any, v: Any, max_seqlen_q: int | None, max_seqlen_k: int | None) -> tuple[int, int]:
    """Multiply-adds of S = Q K^T and of O = P V for the shapes of q, k and v, packed or not."""
    if k is None:
        *rows, _, heads, dim = q
        k_rows, v_dim = rows, dim
    else:
        *rows, heads, dim = q
        k_rows, v_dim = (k[:-2], v[-1]) if v is not None else (k[:-3], k[-1])
    if max_seqlen_q is None:
        pairs = rows[0] * heads * rows[1] * k_rows[1]
    else:
        # The lengths themselves are data: every query of a packed batch is counted with the longest key length.
        pairs = heads * rows[0] * min(max_seqlen_k or 0, k_rows[0])
    return pairs * dim, pairs * v_dim
