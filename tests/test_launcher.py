"""A compiled kernel is started with what Triton's own launch would give it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import triton
from triton.backends.nvidia.driver import CudaLauncher

from flashtile.gpu.launcher import bare_launcher

FUNCTION, STREAM, PROGRAMS = 0xF00, 0x5, 7


def tritons_launcher(record: Callable[..., None], wrapped: bool, scratch: int = 0) -> Any:
    """Triton's own launcher around a recorder in place of its function in C."""

    def inner(*arguments: Any) -> None:
        raise AssertionError("encodes every descriptor anew")

    def wrap(launcher: Callable[..., None]) -> Callable[..., None]:
        return lambda *arguments: inner(launcher, *arguments)

    launcher = CudaLauncher.__new__(CudaLauncher)
    vars(launcher).update(
        launch=wrap(record) if wrapped else record,
        num_ctas=1,
        global_scratch_size=scratch,
        global_scratch_align=1,
        profile_scratch_size=0,
        profile_scratch_align=1,
        launch_cooperative_grid=False,
        launch_pdl=True,
    )
    if triton.__version__ >= "3.7":
        vars(launcher).update(arg_annotations=["note"], kernel_signature=b"signature", gsan_enabled=False)
    return launcher


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace())


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_function_in_c_gets_what_tritons_method_gives_it(wrapped: bool) -> None:
    seen: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> None:
        seen.append(arguments)

    compiled = SimpleNamespace(run=tritons_launcher(record, wrapped), function=FUNCTION, packed_metadata=(4, 1, 1024))
    own = tritons_launcher(record, wrapped=False)
    own(PROGRAMS, 1, 1, STREAM, FUNCTION, compiled.packed_metadata, None, None, None, 10, 20, 0.5)
    bare_launcher(compiled, PROGRAMS)(STREAM, (10, 20, 0.5))
    assert len(seen) == 2
    assert seen[0] == seen[1]


@pytest.mark.usefixtures("driver")
def test_scratch_memory_comes_from_tritons_method(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    method = CudaLauncher.__call__

    def call(launcher: Any, *rest: Any) -> None:
        asked.append((launcher.global_scratch_size, rest[3]))
        launcher.global_scratch_size = 0  # there is no allocator
        method(launcher, *rest)

    monkeypatch.setattr(CudaLauncher, "__call__", call)
    compiled = SimpleNamespace(
        run=tritons_launcher(lambda *_: None, False, scratch=8), function=FUNCTION, packed_metadata=()
    )
    bare_launcher(compiled, PROGRAMS)(STREAM, ())
    assert asked == [(8, STREAM)]


def test_another_devices_launcher_is_called_as_it_is() -> None:
    seen: list[tuple[Any, ...]] = []
    compiled = SimpleNamespace(run=lambda *given: seen.append(given), function=FUNCTION, packed_metadata=(4, 1, 1024))
    bare_launcher(compiled, PROGRAMS)(STREAM, (10, 0.5))
    assert seen == [(PROGRAMS, 1, 1, STREAM, FUNCTION, (4, 1, 1024), None, None, None, 10, 0.5)]
