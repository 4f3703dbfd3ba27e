"""The watchdog: a test that hangs fails with its name, and the others still run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent

HANGING = """
import threading
import pytest

pytest_plugins = "watchdog"

@pytest.mark.gpu(seconds=1.0)
def test_hangs():
    threading.Event().wait()

@pytest.mark.gpu(seconds=60.0)
def test_runs():
    pass

def test_needs_no_watching():
    pass
"""


def test_a_hanging_test_fails_and_the_rest_runs(tmp_path: Path) -> None:
    (tmp_path / "test_hanging.py").write_text(HANGING, "utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n", "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS", "PYTEST_PLUGINS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 2 passed" in done.stdout
    assert "crashed while running 'test_hanging.py::test_hangs'" in done.stdout
