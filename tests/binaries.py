"""Compiles kernels for a GPU that is not there and prints, a JSON line a kernel, what the binary needs.

Run as a script, in a process of its own: which Triton compiles is decided by PYTHONPATH, and the interpreter that the
other tests use must be off.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flashtile.problem import Problem

CAPABILITY = {"sm_80": (8, 0), "sm_90": (9, 0), "gfx942": None}


def problems(target: str, dim: int, few: bool) -> Iterator[Problem]:
    """Every kind of row in the tables of tile sizes for one head dim; `few` leaves the two ends of the list."""
    plain = Problem(
        batch=2, q_len=8192, k_len=8192, q_heads=16, kv_heads=4, qk_dim=dim, v_dim=dim, dtype=torch.bfloat16,
        device="cuda", capability=CAPABILITY[target], window_right=0, scale=dim**-0.5,
    )  # fmt: skip
    bias = {"bias": "additive", "bias_shape": (2, 16, 8192, 8192)}
    everything = replace(
        plain, window_left=1000, softcap=30.0, alibi=True, sinks=True, dropout_p=0.1, kv_heads=16, **bias
    )
    yield plain
    yield everything
    if few:
        return
    yield replace(everything, dtype=torch.float32, bias_shape=(1, 16, 8192, 8192))
    if target == "sm_90":
        yield replace(plain, dropout_p=0.1)
        yield replace(plain, softcap=30.0)
        yield replace(plain, **bias)
        yield replace(plain, bias="boolean", bias_shape=(2, 1, 1, 8192))
        yield replace(plain, varlen=True, total_q=9000, total_k=9000, window_left=100)


def hopper_problems(few: bool) -> Iterator[Problem]:
    """Every kind of row in the Hopper backend's tables."""
    plain = Problem(
        batch=2, q_len=8192, k_len=8192, q_heads=16, kv_heads=4, qk_dim=128, v_dim=128, dtype=torch.bfloat16,
        device="cuda", capability=(9, 0), scale=128**-0.5,
    )  # fmt: skip
    causal = replace(plain, window_right=0)
    bias = {"bias": "additive", "bias_shape": (2, 16, 8192, 8192)}
    packed = {"varlen": True, "total_q": 9000, "total_k": 9000, "sinks": True}
    yield causal
    yield replace(causal, qk_dim=64, v_dim=64)
    yield replace(causal, window_left=1000, **packed)
    latent = replace(causal, qk_dim=192, v_dim=128, kv_heads=16)
    yield latent
    short = {"q_len": 1024, "k_len": 1024, "kv_heads": 16}
    yield replace(causal, **short)
    yield replace(latent, dtype=torch.float16, dropout_p=0.1, window_left=1000, deterministic=True, kv_heads=4)
    if few:
        return
    yield replace(latent, **short)
    yield replace(causal, qk_dim=256, v_dim=256, window_left=1000, **short)
    yield replace(latent, window_right=None, table=True, kv_heads=4)
    yield replace(latent, alibi=True, kv_heads=4, **packed)
    yield replace(latent, window_right=None, dtype=torch.float16, deterministic=True)
    yield replace(latent, softcap=30.0)
    for dim in (64, 128, 256):
        yield replace(plain, qk_dim=dim, v_dim=dim)
    yield replace(plain, q_len=1024, k_len=1024)
    for kv_heads in (4, 16):
        yield replace(causal, qk_dim=256, v_dim=256, deterministic=True, kv_heads=kv_heads)
    yield replace(latent, kv_heads=4)
    yield replace(causal, kv_heads=2)
    yield replace(causal, qk_dim=64, v_dim=64, deterministic=True, **bias)
    for dim in (64, 128):
        yield replace(plain, qk_dim=dim, v_dim=dim, dtype=torch.float16)
    yield replace(causal, qk_dim=64, v_dim=64, **packed)
    yield replace(causal, qk_dim=64, v_dim=64, window_left=1000)
    yield replace(causal, qk_dim=64, v_dim=64, window_left=100)
    yield replace(plain, qk_dim=64, v_dim=64, q_len=4096, k_len=4096, q_heads=10, kv_heads=10, dtype=torch.float16)
    yield replace(causal, qk_dim=96, v_dim=96)
    yield replace(causal, dropout_p=0.1, dtype=torch.float16)
    yield replace(causal, **bias)
    yield replace(causal, window_left=1000, softcap=30.0, alibi=True, sinks=True, dropout_p=0.1, **bias)


def products(cubin: bytes) -> int:
    """Matrix products of whole warp groups in a binary."""
    return occurrences("HGMMA", cubin)


def occurrences(operation: str, cubin: bytes) -> int:
    """How often an operation stands in a binary."""
    return len(re.findall(rf"\b{operation}\b", assembly(cubin)))


def assembly(cubin: bytes) -> str:
    """The instructions of a binary."""
    from flashtile.gpu import binary

    return run_tool([Path(binary.cuobjdump()).with_name("nvdisasm"), "-c"], cubin).stdout


def spills_in_steps(text: str) -> int:
    """Loads and stores of spilled registers in the shortest loops of products and exponentials."""
    lines = text.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\.L_x_\d+):", line.strip()))}
    loops = []
    for i, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target and labels[target[1]] < i:
            inside = "\n".join(lines[labels[target[1]] : i])
            # Waits that lie behind the kernel's end jump back, too, and make loops of what lies between.
            if "HGMMA" in inside and inside.count("MUFU.EX2") > 8:
                loops.append((labels[target[1]], i))
    steps: list[tuple[int, int]] = []
    for start, end in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        if all(end < other[0] or other[1] < start for other in steps):
            steps.append((start, end))
    return sum(len(re.findall(r"\b(?:LDL|STL)\b", line)) for start, end in steps for line in lines[start:end])


def scores_in_order(ptx: str) -> bool:
    """Whether the online softmax, which tells rows by the order of elements, gets a product's registers in their order.

    Holds where nothing stands between the two: of kernels without a mask and without features.
    """
    blocks = re.split(r"mov\.f32 m0, %\w+;|vote\.sync\.any", ptx)
    found = [[int(n) for n in re.findall(r"fma\.rn\.f32 \S+, %[a-z]+(\d+), %\w+, base\d;", block)] for block in blocks]
    found = [numbers for numbers in found if numbers]
    return bool(found) and all(numbers == list(range(numbers[0], numbers[0] + len(numbers))) for numbers in found)


def serialized(ptx: str) -> list[str]:
    """ptxas's words, C7510 to C7519, where it waits for products or runs them one by one without having been told."""
    from triton.backends.nvidia.compiler import get_ptxas  # newer releases ship two of them

    log = run_tool([get_ptxas(90).path, "-v", "--gpu-name=sm_90a", "-o", os.devnull], ptx.encode())
    return re.findall(r".*C751\d.*", log.stdout + log.stderr)


def run_tool(command: list[str | Path], data: bytes) -> subprocess.CompletedProcess[str]:
    """One of the tools that Triton ships, on data in a file."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        return subprocess.run([*command, file.name], capture_output=True, text=True, check=True)


def describe_hopper(kernel: Any) -> dict[str, Any]:
    """What a kernel of the Hopper backend needs, its products and the warnings about them."""
    from flashtile.gpu import binary

    asm = kernel.asm
    return {
        **binary.read(kernel)._asdict(),
        "products": products(asm["cubin"]),
        "serialized": serialized(asm["ptx"]),
        "spills_in_steps": spills_in_steps(assembly(asm["cubin"])),
        "scores_in_order": scores_in_order(asm["ptx"]),
    }


def report(kernel: str, problem: Problem, found: dict[str, Any]) -> None:
    print(json.dumps({"kernel": kernel, "problem": str(problem), **found}), flush=True)


def main_hopper(mode: str, few: str) -> None:
    """mode: forward or backward."""
    from flashtile.backends.hopper import compile as binaries

    for problem in hopper_problems(few == "few"):
        for name in binaries.kernels(problem):
            if (name == "forward") == (mode == "forward"):
                report(name, problem, describe_hopper(binaries.compiled(name, problem)))


def main(target: str, dim: str, few: str) -> None:
    from flashtile.backends.triton import compile as binaries

    for problem in problems(target, int(dim), few == "few"):
        for kernel, needs in binaries.resources(problem, target).items():
            report(kernel, problem, needs._asdict())


if __name__ == "__main__":
    if sys.argv[1] == "hopper":
        main_hopper(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
