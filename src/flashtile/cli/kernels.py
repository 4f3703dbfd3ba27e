"""The kernels that a backend would run for a problem, with their tile sizes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

from flashtile.problem import Problem

# Backends whose kernels Triton compiles, and the targets that theirs are written for, as regular expressions.
COMPILED = {"hopper": "sm_90", "triton": r"sm_\d+|gfx\w+"}


@dataclass(frozen=True)
class Kernel:
    """One kernel of a call.

    mode: forward or backward. block_m: query rows of one head in a tile; block_n: keys. by_keys: a program holds a tile
    of keys and walks over queries, else the other way round. shares_keys: a program serves all query heads of a
    key-value head. adds_dq: dq is accumulated in slow memory. dense: the whole score matrix is stored. programs: at
    most so many, which then walk through the tiles; 0 is one for each tile. heads: the key-value heads, of all batches,
    that it serves; None: all. alone: so many of a head's tiles of keys are held for one query head at a time, and their
    sums of dk and dv lie in slow memory until the group's next one comes. compiled_as: its name where Triton kernels
    are compiled.
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
    heads: int | None = None
    alone: int = 0
    compiled_as: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def kernels_of(problem: Problem, backend: str) -> list[Kernel]:
    """The kernels of forward and backward."""
    return {"hopper": _hopper, "triton": _triton, "blocked": _blocked, "reference": _reference}[backend](problem)


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
    from flashtile.backends.hopper import backward_configs, configs

    bias = configs.addressable_bias(problem)
    forward = configs.forward(problem, bias and configs.room_for_bias(problem))
    assert forward is not None, problem

    names = {
        "backward": "backward",
        "backward_keys": "backward, dk and dq",
        "backward_values": "backward, dv",
        "backward_early_values": "backward, dv of the first heads",
        "backward_late_values": "backward, dv of the others",
    }

    def backward(one: backward_configs.Launch) -> Kernel:
        config = backward_configs.pick(problem, bias and backward_configs.room_for_bias(problem), one.makes)
        tiles = -(-problem.k_len // config.block_n)
        relays = backward_configs.relays(problem) and one.makes != "values"
        return Kernel(
            names[one.name],
            "backward",
            config.block_m,
            config.block_n,
            by_keys=True,
            shares_keys=True,
            adds_dq=one.makes != "values",
            programs=configs.MULTIPROCESSORS,
            heads=one.heads,
            alone=backward_configs.alone(problem, tiles) if relays else 0,
            compiled_as=one.name,
            settings={key: value for key, value in asdict(config).items() if key != "block_m"},
        )

    return [
        Kernel(
            "forward",
            "forward",
            64 * forward.groups,
            forward.block_n,
            programs=configs.MULTIPROCESSORS,
            compiled_as="forward",
            settings={key: value for key, value in asdict(forward).items() if key != "block_n"},
        ),
        *map(backward, backward_configs.launches(problem)),
    ]


def resources_of(problem: Problem, backend: str, kernels: list[Kernel], target: str) -> dict[str, dict[str, int]]:
    """Registers and spilled bytes of a thread and bytes of shared memory of each kernel, compiled for a target.

    backend: one of COMPILED. Raises ValueError where Triton cannot compile here.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise ValueError("Triton runs in its interpreter (TRITON_INTERPRET) and compiles nothing")
    from flashtile.gpu import binary

    compiler = import_module(f"flashtile.backends.{backend}.compile")
    names = [kernel.compiled_as for kernel in kernels]
    return {name: binary.read(compiler.compiled(name, problem, target))._asdict() for name in names if name is not None}


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
