"""New interpreters for what can only be seen in one: the first import, the first compiled call, several ranks."""

from __future__ import annotations

import os
import subprocess
import sys


def fresh_process(code: str, *arguments: str, **environment: str) -> str:
    """What a new interpreter prints; its failure is the test's failure, with its own words."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.strip()
