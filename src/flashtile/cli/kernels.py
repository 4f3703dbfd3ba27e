"""The kernels that a backend would run for a problem, with their tile sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from flashtile.problem import Problem


@dataclass(frozen=True)
class Kernel:
    """One kernel of a call.

    mode: forward or backward. block_m: query rows of one head in a tile; block_n: keys. by_keys: a program holds a tile
    of keys and walks over queries, else the other way round. shares_keys: a program serves all query heads of a
    key-value head. adds_dq: dq is accumulated in slow memory. dense: the whole score matrix is stored.
    """

    name: str
    mode: str
    block_m: int
    block_n: int
    by_keys: bool = False
    shares_keys: bool = False
    adds_dq: bool = False
    dense: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


def kernels_of(problem: Problem, backend: str) -> list[Kernel]:
    """The kernels of forward and backward."""
    return {"triton": _triton, "blocked": _blocked, "reference": _reference}[backend](problem)


def _triton(problem: Problem) -> list[Kernel]:
    from flashtile.backends.triton import configs

    def kernel(name: str, mode: str, config: configs.Config, **facts: bool) -> Kernel:
        settings = {key: value for key, value in asdict(config).items() if not key.startswith("BLOCK_")}
        return Kernel(name, mode, config.BLOCK_M, config.BLOCK_N, settings=settings, **facts)

    return [
        kernel("forward", "forward", configs.forward(problem)),
        kernel("backward, dq", "backward", configs.backward_queries(problem)),
        kernel("backward, dk and dv", "backward", configs.backward_keys(problem), by_keys=True, shares_keys=True),
    ]


def _blocked(problem: Problem) -> list[Kernel]:
    from flashtile.backends.blocked import configs

    found = []
    for mode, config in (("forward", configs.pick_forward(problem)), ("backward", configs.pick_backward(problem))):
        rows = max(config.rows // problem.group, 1)
        backward = mode == "backward"
        settings = {key: value for key, value in asdict(config).items() if key not in ("rows", "keys")}
        found.append(Kernel(mode, mode, rows, config.keys, backward, True, backward, settings=settings))
    return found


def _reference(problem: Problem) -> list[Kernel]:
    whole = (max(1, problem.q_len), max(1, problem.k_len))
    return [Kernel(mode, mode, *whole, dense=True) for mode in ("forward", "backward")]
