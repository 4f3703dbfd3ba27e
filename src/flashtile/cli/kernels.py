"""The kernels that a backend would run for a problem, with their tile sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any

from flashtile.problem import Problem

# Backends whose kernels Triton compiles, and the targets that theirs are written for, as regular expressions.
COMPILED = {"hopper": "sm_90", "triton": r"sm_\d+|gfx\w+"}

_H100_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Kernel:
    """One kernel of a call.

    mode: forward or backward. block_m: query rows of one head in a tile; block_n: keys. by_keys: a program holds a tile
    of keys and walks over queries, else the other way round. shares_keys: a program serves all query heads of a
    key-value head. adds_dq: dq is accumulated in slow memory. dense: the whole score matrix is stored. programs: at
    most so many, which then walk through the tiles; 0 is one for each tile. compiled_as: its name where Triton kernels
    are compiled. backend: whose it is.
    """

    name: str
    mode: str
    block_m: int
    block_n: int
    by_keys: bool = False
    shares_keys: bool = False
    adds_dq: bool = False
    dense: bool = False
    programs: int = 0
    compiled_as: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    backend: str = ""


def kernels_of(problem: Problem, forward: str, backward: str | None) -> list[Kernel]:
    """The kernels of the forward on one backend and of the backward on another, or none."""
    tables = {"hopper": _hopper, "triton": _triton, "blocked": _blocked, "reference": _reference}
    return [
        replace(kernel, backend=backend)
        for mode, backend in (("forward", forward), ("backward", backward))
        if backend is not None
        for kernel in tables[backend](problem)
        if kernel.mode == mode
    ]


def _triton(problem: Problem) -> list[Kernel]:
    from flashtile.backends.triton import configs

    def kernel(compiled_as: str, config: configs.Config) -> Kernel:
        by_keys = compiled_as == "keys"
        return Kernel(
            {"forward": "forward", "queries": "backward, dq", "keys": "backward, dk and dv"}[compiled_as],
            "forward" if compiled_as == "forward" else "backward",
            config.BLOCK_M,
            config.BLOCK_N,
            by_keys=by_keys,
            shares_keys=by_keys,
            compiled_as=compiled_as,
            settings={key: value for key, value in asdict(config).items() if not key.startswith("BLOCK_")},
        )

    return [
        kernel("forward", configs.forward(problem)),
        kernel("queries", configs.backward_queries(problem)),
        kernel("keys", configs.backward_keys(problem)),
    ]


def _hopper(problem: Problem) -> list[Kernel]:
    from flashtile.backends import hopper
    from flashtile.backends.hopper import backward_configs, configs

    forward = configs.forward(problem)
    assert forward is not None, problem
    kernels = [
        Kernel(
            "forward",
            "forward",
            64 * forward.groups,
            forward.block_n,
            programs=_H100_MULTIPROCESSORS,
            compiled_as="forward",
            settings={key: value for key, value in asdict(forward).items() if key != "block_n"},
        )
    ]
    if hopper.supports_backward(problem) is not None:
        return kernels
    backward = backward_configs.pick(problem)
    settings = {key: value for key, value in asdict(backward).items() if key != "block_m"}
    tile = (backward.block_m, backward.block_n)
    return [
        *kernels,
        Kernel("backward", "backward", *tile, True, True, True, compiled_as="backward", settings=settings),
    ]


def resources_of(problem: Problem, kernels: list[Kernel], target: str) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of a thread and bytes of shared memory of each kernel, compiled for a target.

    kernels: of backends in COMPILED. Raises ValueError where Triton cannot compile here.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise ValueError("Triton runs in its interpreter (TRITON_INTERPRET) and compiles nothing")
    from flashtile.gpu import binary

    found = {}
    for kernel in kernels:
        if kernel.compiled_as is not None:
            compiler = import_module(f"flashtile.backends.{kernel.backend}.compile")
            found[kernel.compiled_as] = binary.read(compiler.compiled(kernel.compiled_as, problem, target))._asdict()
    return found


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
