"""A test that hangs ends its process, with its name: a kernel that waits forever cannot be interrupted otherwise.

Under pytest-xdist the process is one worker: the test is reported as failed, a new worker goes on with the rest. Loaded
as a plugin by conftest.py. Tests marked gpu have SECONDS to finish, or what `@pytest.mark.gpu(seconds=...)` says.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator

import pytest

SECONDS = 300.0
EXIT_STATUS = 70


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    mark = item.get_closest_marker("gpu")
    if mark is None:
        return (yield)
    timer = threading.Timer(mark.kwargs.get("seconds", SECONDS), _end, (item.nodeid,))
    timer.daemon = True
    timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


def _end(name: str) -> None:
    # The real standard error: the one of sys belongs to the test that hangs.
    print(f"watchdog: {name} did not finish in time", file=sys.__stderr__, flush=True)
    os._exit(EXIT_STATUS)
