"""Data parallelism needs nothing special: in two gloo processes, DDP and FSDP give the single process's gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ranks


@pytest.mark.parametrize("way", ["ddp", "ddp-checkpointed", "fsdp", "fsdp-checkpointed"])
def test_gradients_of_two_ranks_are_those_of_one(way: str, tmp_path: Path) -> None:
    outputs = start(way, tmp_path)
    assert outputs == ["12 gradients agree"] * ranks.RANKS


def test_a_wrong_gradient_is_noticed(tmp_path: Path) -> None:
    """Both ranks given the same half of the batch cannot agree with the whole."""
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        start("ddp-same-half", tmp_path)


def start(way: str, folder: Path) -> list[str]:
    """What each rank prints; a failed rank's words are the test's failure, and nobody is left waiting for it."""
    command = [sys.executable, "-W", "ignore", ranks.__file__, way]
    # Gloo would look up this machine's name, and wait where its network answers slowly or not.
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else None
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(folder / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(ranks.RANKS)
    ]
    try:
        outputs = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    if any(process.returncode for process in processes):
        raise AssertionError("\n".join(stderr for _, stderr in outputs))
    return [stdout.strip() for stdout, _ in outputs]
