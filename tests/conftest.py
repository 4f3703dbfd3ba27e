"""What holds for every test: poisoned memory, fixed seeds, one thread a worker, Triton's interpreter without a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from flashtile.testing import poisoned

pytest_plugins = "watchdog"

GPU = torch.cuda.is_available()

# Triton reads this once, when it is imported, so it is decided before any test module is.
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Workers share the machine's cores; a worker's own threads would only fight the other's.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# Derandomised: a run that fails, fails again. No deadline: the first call of a backend imports or compiles it.
settings.register_profile("flashtile", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("flashtile")

_deselected = pytest.StashKey[int]()


@pytest.fixture(scope="session", autouse=True)
def _fresh_memory_is_poisoned() -> Iterator[None]:
    """A result that was never computed cannot pass by luck: fresh memory is often zero, and zero often the answer."""
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def _same_seed_for_every_test() -> None:
    torch.manual_seed(20220527)


@pytest.fixture(autouse=True)
def _no_setting_outlives_a_test() -> Iterator[None]:
    """A test that switches PyTorch's global modes and fails half-way must not change the next one."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_float32_matmul_precision(precision)


def pytest_report_header(config: pytest.Config) -> str:
    if GPU:
        return f"gpu: {torch.cuda.get_device_name()}"
    return "gpu: none, so tests marked gpu are deselected and Triton kernels run in its interpreter"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if GPU:
        return
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[_deselected] = len(on_gpu)
    config.hook.pytest_deselected(items=on_gpu)
    items[:] = [item for item in items if not item.get_closest_marker("gpu")]


def pytest_sessionfinish(session: pytest.Session) -> None:
    # An xdist worker tells the controller, which collects nothing itself, how many tests it left out.
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deselected"] = session.config.stash.get(_deselected, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object, error: object) -> None:
    counted = getattr(node, "workeroutput", {}).get("deselected", 0)
    node.config.stash[_deselected] = counted


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counted = config.stash.get(_deselected, 0)
    if counted:
        terminalreporter.write_line(f"{counted} tests marked gpu were deselected: this machine has no GPU")
