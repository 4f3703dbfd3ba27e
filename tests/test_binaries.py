"""The kernels compile without a GPU for every target and supported Triton, and what is shipped spills no register."""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import binaries
import pytest

ROOT = Path(__file__).parent.parent
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
TARGETS = tuple(SHARED_MEMORY)
DIMS = (64, 128, 256)
OTHER_TRITONS = ("3.6.0", "3.9.0")

# float32 products in 3xTF32 hold a whole head dim twice, so that above 64 even the smallest tile spills a little when
# a call has every feature at once (the gradient of a shared bias above 128: a lot). Bytes; nothing else may spill.
FLOAT32_SPILLS = {
    128: {"bias": 40},
    256: {"forward": 256, "queries": 512, "keys": 768, "bias": 8192},
}


def installed(version: str) -> Path:
    """The folder of another Triton release, installed beside the environment's own on first use."""
    folder = ROOT / ".cache" / "triton" / version
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{version}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "triton").exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
            subprocess.run([*pip, f"triton=={version}"], check=True)
    return folder


def needs(*arguments: str, version: str | None = None) -> list[dict[str, Any]]:
    """What each kernel's binary needs, compiled by another release of Triton where a version is given.

    arguments: target and head dim, or "hopper" and the mode.
    """
    paths = [str(ROOT / "src"), str(ROOT / "tests")]
    if version is not None:
        paths.insert(0, str(installed(version)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("TRITON_INTERPRET", None)
    script = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "binaries.py"), *arguments]
    done = subprocess.run(
        [*script, "all" if version is None else "few"], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(rows: list[dict[str, Any]], target: str, dim: int) -> None:
    """Raises where a kernel spills registers or takes more shared memory than the target has."""
    assert {row["kernel"] for row in rows} >= {"forward", "queries", "keys"}
    for row in rows:
        assert row["registers"] > 0, row
        known = FLOAT32_SPILLS.get(dim, {}) if "float32" in row["problem"] else {}
        assert row["spills"] <= known.get(row["kernel"], 0), f"spills: {row}"
        assert row["shared"] <= SHARED_MEMORY[target], f"shared memory: {row}"


# Bytes. The Hopper backward still spills: most around its loops, with every feature at once inside them.
HOPPER_BACKWARD_SPILLS = {"softcap": 1400, "dropout": 380, "": 200}

# Of them, around the steps for dV: with Triton 3.7 one register, which a role reads once.
HOPPER_VALUES_SPILLS = {"3.9.0": 80, "": 8}

# Bytes that the Hopper forward spills once an item, around its steps, whose tiles take all registers.
HOPPER_FORWARD_SPILLS = {"3.9.0": 128, "": 64}

# Loads and stores of spilled registers in the steps themselves: in the forward's with Triton 3.9 and dropout only, in
# the backward's without dropout, softcap and bias.
HOPPER_SPILLS_IN_STEPS = {("forward", "3.9.0"): 70, ("backward", "3.9.0"): 150, ("backward", ""): 10}

# Of three registers, in the masked steps of a window where the first tile stores dQ; of more at head dim 64.
HOPPER_WINDOW_SPILLS_IN_STEPS = {" d64 ": 60, "": 24}


def known_hopper_spills(kernel: str, problem: str, version: str | None) -> int:
    if kernel == "prologue":
        return 8 if "softcap" in problem else 0
    if kernel.endswith("values") and not re.search("dropout|alibi", problem):
        return HOPPER_VALUES_SPILLS.get(version or "", HOPPER_VALUES_SPILLS[""])
    if kernel.startswith("backward"):
        return next(limit for feature, limit in HOPPER_BACKWARD_SPILLS.items() if feature in problem)
    return HOPPER_FORWARD_SPILLS.get(version or "", HOPPER_FORWARD_SPILLS[""])


def known_hopper_spills_in_steps(kernel: str, problem: str, version: str | None) -> float:
    if kernel.startswith("backward") and re.search("dropout|softcap|bias", problem):
        return math.inf
    if kernel == "backward" and "window" in problem and version != "3.9.0":
        return next(limit for dim, limit in HOPPER_WINDOW_SPILLS_IN_STEPS.items() if dim in problem)
    known, mode = HOPPER_SPILLS_IN_STEPS, "backward" if kernel == "backward_keys" else kernel
    return known.get((mode, version or ""), known.get((mode, ""), 0))


def check_hopper(rows: list[dict[str, Any]], mode: str, version: str | None = None) -> None:
    """As `check`, and raises where a kernel has no products of warp groups or lets them run one by one."""
    assert {row["kernel"] for row in rows} >= {mode}
    for row in rows:
        assert row["registers"] > 0, row
        assert row["spills"] <= known_hopper_spills(row["kernel"], row["problem"], version), f"spills: {row}"
        in_steps = known_hopper_spills_in_steps(row["kernel"], row["problem"], version)
        assert row["spills_in_steps"] <= in_steps, f"spills in steps: {row}"
        plain = row["kernel"] == "forward" and row["problem"].endswith("float16 cuda")
        assert row["scores_in_order"] or not plain, f"scores: {row}"
        assert row["shared"] <= SHARED_MEMORY["sm_90"], f"shared memory: {row}"
        assert row["products"] > 0 or row["kernel"] in ("prologue", "epilogue"), f"no products: {row}"
        assert not row["serialized"], f"serialized: {row}"


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("target", TARGETS)
def test_shipped_tiles_spill_nothing(target: str, dim: int) -> None:
    check(needs(target, str(dim)), target, dim)


@pytest.mark.parametrize("version", OTHER_TRITONS)
@pytest.mark.parametrize("target", TARGETS)
def test_oldest_and_newest_triton_compile_the_same(version: str, target: str) -> None:
    check(needs(target, "128", version=version), target, 128)


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("version", [None, *OTHER_TRITONS])
def test_hopper_kernels(version: str | None, mode: str) -> None:
    rows = needs("hopper", mode, version=version)
    check_hopper(rows, mode, version)
    if mode == "backward":  # latent attention's comes in two launches or three
        parts = {f"{mode}_{part}" for part in ("keys", "values", "early_values", "late_values")}
        assert {row["kernel"] for row in rows} == {"prologue", mode, *parts, "epilogue"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"spills": 72}, "spills: "),
        ({"spills_in_steps": 1}, "spills in steps"),
        ({"scores_in_order": False}, "scores: "),
        ({"shared": 2**18}, "shared memory"),
        ({"products": 0}, "no products"),
        ({"serialized": ["(C7510) Potential Performance Loss"]}, "serialized"),
    ],
)
def test_a_bad_hopper_kernel_is_caught(wrong: dict[str, Any], message: str) -> None:
    good = {
        "kernel": "forward",
        "problem": "b2 q8192 k8192 h16/4 d128 bfloat16 cuda",
        "registers": 168,
        "spills": 0,
        "spills_in_steps": 0,
        "scores_in_order": True,
        "shared": 1024,
        "products": 8,
        "serialized": [],
    }
    check_hopper([good], "forward")
    with pytest.raises(AssertionError, match=message):
        check_hopper([{**good, **wrong}], "forward")


def test_spills_in_the_steps_of_a_backward_are_caught_but_with_features() -> None:
    row = {
        "kernel": "backward",
        "problem": "b2 q8192 k8192 h16/4 d128 bfloat16 cuda causal",
        "registers": 128,
        "spills": 40,
        "spills_in_steps": 11,
        "scores_in_order": True,
        "shared": 1024,
        "products": 24,
        "serialized": [],
    }
    with pytest.raises(AssertionError, match="spills in steps"):
        check_hopper([row], "backward")
    check_hopper([{**row, "problem": row["problem"] + " dropout0.1"}], "backward")
    with pytest.raises(AssertionError, match="spills in steps"):
        check_hopper([{**row, "spills_in_steps": 0}, {**row, "kernel": "backward_keys"}], "backward")
    few = {**row, "spills_in_steps": 0, "spills": 8}
    check_hopper([few, {**few, "kernel": "backward_keys"}], "backward")
    with pytest.raises(AssertionError, match="spills: "):
        check_hopper([few, {**few, "spills": 16, "kernel": "backward_values"}], "backward")


def test_scores_out_of_order_are_noticed() -> None:
    ptx = "mov.f32 m0, %r9; fma.rn.f32 %r1, %r20, %r3, base0; fma.rn.f32 %r2, %r21, %r3, base1; vote.sync.any.pred far"
    assert binaries.scores_in_order(ptx)
    assert not binaries.scores_in_order(ptx.replace("%r21", "%r22"))
    assert not binaries.scores_in_order("")


def test_spills_in_steps_are_told_from_those_around_them() -> None:
    step = ["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;", *["MUFU.EX2 R0, R0 ;"] * 16]
    loop = [".L_x_1:", *step, "@P0 BRA `(.L_x_1) ;"]
    around = [".L_x_0:", "LDL R1, [R1] ;", *loop, "STL [R1], R1 ;", "@P1 BRA `(.L_x_0) ;"]
    assert binaries.spills_in_steps("\n".join(around)) == 0
    loop.insert(3, "STL [R1], R1 ;")
    assert binaries.spills_in_steps("\n".join([".L_x_0:", *loop, "@P1 BRA `(.L_x_0) ;"])) == 1


# Touches a product's accumulator while it runs.
SERIALIZED = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry touch(.param .u64 out, .param .u64 tile) {
  .reg .f32 %f<4>; .reg .b64 %r<2>; .reg .pred %p;
  ld.param.u64 %r0, [out];
  ld.param.u64 %r1, [tile];
  mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
  setp.ne.b64 %p, %r1, 0;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %r1, %r1, %p, 1, 1, 0, 0;
  TOUCH
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  st.global.f32 [%r0], %f0;
  ret;
}
"""


def test_serialized_products_are_read_from_ptxas() -> None:
    pytest.importorskip("triton")
    assert binaries.serialized(SERIALIZED.replace("TOUCH", "")) == []
    warning, *_ = binaries.serialized(SERIALIZED.replace("TOUCH", "add.f32 %f0, %f0, %f0;"))
    assert "warpgroup.wait is injected" in warning


def test_a_spill_is_caught() -> None:
    row = {"kernel": "forward", "problem": "bfloat16", "registers": 255, "spills": 8, "shared": 1024}
    rows = [row, {**row, "kernel": "queries", "spills": 0}, {**row, "kernel": "keys", "spills": 0}]
    with pytest.raises(AssertionError, match="spills"):
        check(rows, "sm_90", 256)


def test_too_much_shared_memory_is_caught() -> None:
    row = {"kernel": "forward", "problem": "bfloat16", "registers": 255, "spills": 0, "shared": 2**17}
    with pytest.raises(AssertionError, match="shared memory"):
        check([row, {**row, "kernel": "queries"}, {**row, "kernel": "keys"}], "gfx942", 128)
