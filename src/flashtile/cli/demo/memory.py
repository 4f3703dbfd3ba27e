"""The peak memory of one action, measured truly: on a CPU by the operating system, in a process of its own.

A fresh process prepares the action (its inputs, a small call of the same kind, so that code and threads are loaded),
notes the high-water mark of its resident memory, runs the action once and notes it again. The difference is what the
action needed beyond its inputs, whoever allocated it, to about a MiB. On a CUDA device PyTorch's allocator says it.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from flashtile.cli import timing

if sys.platform != "win32":
    import resource

Action = Callable[[], object]
Prepare = Callable[[], Action]

# On Linux a server process that has only imported the package forks each child within milliseconds; it has started no
# threads, so forking is safe. Elsewhere each child starts from nothing.
START = "forkserver" if sys.platform == "linux" else "spawn"
METHODS = {
    "cpu": "the rise of a fresh process's resident memory (getrusage ru_maxrss) over one call, to about a MiB",
    "cuda": "the high-water mark of PyTorch's CUDA allocator over one call",
}


class Peak(NamedTuple):
    """bytes: the most that was held beyond what existed before; None where that is unknown, for the reason given."""

    bytes: int | None
    reason: str | None = None


def peak(prepare: Prepare, device: str) -> Peak:
    """The peak memory of the action that `prepare` returns; on a CPU `prepare` is pickled and runs in a new process."""
    if device == "cuda":
        return _on_cuda(prepare)
    if device != "cpu" or sys.platform == "win32":
        return Peak(None, f"peak memory is not measured on {sys.platform if device == 'cpu' else device}")
    context = multiprocessing.get_context(START)
    if START == "forkserver":
        context.set_forkserver_preload(["flashtile.cli.demo"])
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(send, prepare, torch.get_num_threads()))  # type: ignore[attr-defined]
    child.start()
    send.close()
    try:
        return Peak(*receive.recv())
    except EOFError:
        child.join()
        return Peak(None, f"the process ended with exit code {child.exitcode}; -9 is the system being out of memory")
    finally:
        child.join()
        receive.close()


def _on_cuda(prepare: Prepare) -> Peak:
    try:
        return Peak(timing.peak_bytes(timing.Plain(prepare()), "cuda"))
    except torch.OutOfMemoryError as error:
        return Peak(None, str(error).splitlines()[0])


def _measure(send: Connection, prepare: Prepare, threads: int) -> None:
    torch.set_num_threads(threads)
    action = prepare()
    before = _high_water_mark()
    try:
        action()
    except (MemoryError, RuntimeError) as error:
        send.send((None, str(error).splitlines()[0]))
    else:
        send.send((_high_water_mark() - before, None))


def _high_water_mark() -> int:
    """Bytes; Linux counts in KiB, macOS in bytes."""
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
