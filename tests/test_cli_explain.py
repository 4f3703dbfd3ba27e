"""`flashtile explain`: tiles against a mask looked at element by element, operations, traffic, bounds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from flashtile import masks
from flashtile.cli.commands import app
from flashtile.cli.tiles import Tiling
from flashtile.problem import Problem
from flashtile.reference import traffic

MASKS: dict[str, masks.Mask] = {
    "full": masks.Full(),
    "causal": masks.Causal(),
    "window": masks.Window(20, 3),
    "narrow": masks.Window(0, 0),
    "ahead": masks.Window(None, -40),
    "prefix": masks.Prefix(30),
    "chunked": masks.Chunked(24),
    "documents": masks.Documents((10, 50, 3, 20)),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("q_len", "k_len"), [(96, 96), (70, 101), (101, 70), (1, 40)])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 32), (32, 16), (64, 64)])
def test_tiles_are_those_of_the_mask_looked_at(name: str, q_len: int, k_len: int, block_m: int, block_n: int) -> None:
    """full: every element is seen. skipped: outside of what first and last row span. Both counted by brute force."""
    lo, hi = traffic.interval_of_rows(traffic.Shape(q_len, k_len, 1, 1, 1, 1, MASKS[name]))
    key = torch.arange(k_len)
    seen = (key >= lo[:, None]) & (key < hi[:, None])
    kinds = []
    for row in range(0, q_len, block_m):
        line = ""
        rows = slice(row, min(row + block_m, q_len))
        for column in range(0, k_len, block_n):
            tile = seen[rows, column : column + block_n]
            spanned = int(lo[rows][0]) < min(column + block_n, k_len) and int(hi[rows][-1]) > column
            spanned = spanned and int(hi[rows][-1]) > int(lo[rows][0])
            assert spanned or not tile.any()
            line += "F" if bool(tile.all()) else "P" if spanned else "."
        kinds.append(line)
    tiling = Tiling(lo, hi, k_len, block_m, block_n)
    text = "".join(kinds)
    counts = {"total": len(text), "skipped": text.count("."), "partial": text.count("P"), "full": text.count("F")}
    assert tiling.counts() == counts
    assert tiling.picture(1000, 1000) == kinds


def test_a_picture_of_many_tiles_is_made_smaller() -> None:
    lo, hi = traffic.interval_of_rows(traffic.Shape(1024, 1024, 1, 1, 1, 1, masks.Causal()))
    picture = Tiling(lo, hi, 1024, 16, 16).picture(8, 8)
    assert picture == ["F" * row + "P" + "." * (7 - row) for row in range(8)]


def explain(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["explain", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


CALL = ("q=2,4096,16,128", "k=2,4096,4,128", "--device", "cuda", "--capability", "9.0", "--dtype", "bf16")


def test_the_example_of_the_help() -> None:
    result = explain(*CALL, "--causal", "--window", "512,0")
    assert result["problem"] == "b2 q4096 k4096 h16/4 d128 bfloat16 cuda window(512,0)"
    assert result["backend"] == "hopper"
    # Row i sees min(i + 1, 513) keys.
    pairs = 513 * 512 / 2 + (4096 - 512) * 513
    assert result["visible_share"] == pytest.approx(pairs / 4096**2)
    assert result["flops"]["forward"] == 2 * 16 * pairs * 4 * 128
    assert result["flops"]["backward"] == 2.5 * result["flops"]["forward"]
    assert {kernel["name"] for kernel in result["kernels"]} >= {"forward"}
    for kernel in result["kernels"]:
        counts = kernel["tiles"]
        assert counts["total"] == -(-4096 // kernel["block_m"]) * -(-4096 // kernel["block_n"])
        assert counts["skipped"] > counts["partial"] > 0


def test_other_capabilities_are_served_by_triton() -> None:
    result = explain(*CALL[:-4], "--capability", "8.0")
    assert result["backend"] == "triton"
    assert "9.0 only" in result["backends"]["hopper"]


def test_programs_of_the_hopper_kernels() -> None:
    """They stay and walk through the tiles, as many as an H100 runs at once; no more than there are tiles."""
    forward, backward = explain(*CALL, "--backend", "hopper")["kernels"]
    assert (forward["name"], backward["name"]) == ("forward", "backward")
    assert forward["programs"] == 132
    assert backward["programs"] == 132
    few, few_keys = explain("q=1,100,1,128", *CALL[2:], "--backend", "hopper")["kernels"]
    assert few["programs"] == -(-100 // few["block_m"])
    assert few_keys["programs"] == -(-100 // few_keys["block_n"])


def test_heads_that_come_in_rounds() -> None:
    """Each has programs of its own, which read the keys and what the heads before have summed."""
    shapes = ("q=1,100,8,256", "k=1,100,1,256", "v=1,100,1,256", "--causal", *CALL[2:], "--backend", "hopper")
    rounds = explain(*shapes)
    together = explain(*shapes[:3], "--window", "100,0", *shapes[4:])  # the same pairs
    for result, programs in ((rounds, 2 * 8), (together, 2)):
        assert result["kernels"][1]["block_n"] == 64
        assert result["kernels"][1]["programs"] == programs
    moved = rounds["traffic"]["backward"]["this kernel"] - together["traffic"]["backward"]["this kernel"]
    assert moved == 3 * 7 * 100 * 512 * 2
    more = explain(*[shape.replace("100", "1000") for shape in shapes])["kernels"][1]
    assert more["programs"] == 16 + 14 * 7, "two tiles of 64 keys are gone through with all heads at once"


def test_the_backward_of_latent_attention_is_two_kernels_or_three() -> None:
    shapes = ("q=1,4096,16,192", "k=1,4096,16,192", "v=1,4096,16,128")
    _, values, keys = explain(*shapes, *CALL[2:], "--backend", "hopper")["kernels"]
    assert (keys["name"], values["name"]) == ("backward, dk and dq", "backward, dv")
    assert (keys["block_n"], values["block_n"]) == (128, 192)
    shapes = tuple(shape.replace(",16,", ",128,") for shape in shapes)
    _, early, keys, late = explain(*shapes, *CALL[2:], "--backend", "hopper")["kernels"]
    assert (early["name"], late["name"]) == ("backward, dv of the first heads", "backward, dv of the others")
    assert early["programs"] == keys["programs"] == late["programs"] == 132
    capped = explain(*shapes, *CALL[2:], "--backend", "hopper", "--softcap", "20")["kernels"]
    assert [kernel["name"] for kernel in capped] == ["forward", "backward"]


@pytest.mark.parametrize(
    ("dim", "heavy", "keys", "rows"),
    [(64, False, 64, 128), (64, True, 64, 128), (128, False, 128, 128), (256, False, 32, 64)],
)
def test_tiles_beside_a_bias(dim: int, heavy: bool, keys: int, rows: int) -> None:
    """What is shown is what runs: a bias that TMA loads has tiles of its own, by a rule of each direction."""
    from flashtile.backends.hopper import compile as compiler

    arguments = ["--device", "cuda", "--backend", "hopper", "--bias", "1,2,4096,4096"]
    arguments += ["--softcap", "20", "--alibi", "--dropout", "0.1"] if heavy else []
    forward, backward = explain(f"q=1,4096,2,{dim}", *arguments)["kernels"]
    assert (forward["block_n"], backward["block_n"]) == (keys, rows)
    problem = Problem(
        batch=1, q_len=4096, k_len=4096, q_heads=2, kv_heads=2, qk_dim=dim, v_dim=dim, dtype=torch.bfloat16,
        device="cuda", capability=(9, 0), scale=dim**-0.5, bias="additive", bias_shape=(1, 2, 4096, 4096),
        softcap=20.0 * heavy, alibi=heavy, dropout_p=0.1 * heavy,
    )  # fmt: skip
    found = {name: compiler._launch(name, problem).plan.values for name in ("forward", "backward")}
    assert found["forward"]["BLOCK_N"] == keys
    assert found["backward"]["GROUPS"] * 64 == rows


def test_traffic_falls_from_standard_to_tiled_and_not_below_each_tensor_once() -> None:
    result = explain(*CALL, "--causal")
    for mode in ("forward", "backward"):
        moved = result["traffic"][mode]
        for name in ("FlashAttention-1", "FlashAttention-2", "this kernel"):
            assert moved["standard"] > moved[name] > moved["at least"]
    assert result["traffic"]["forward"]["FlashAttention-1"] > result["traffic"]["forward"]["FlashAttention-2"]
    # Standard attention reads Q, K, V, S and P, writes S, P and O, for each query head.
    n, d = 4096, 128
    assert result["traffic"]["forward"]["standard"] == 2 * 2 * 16 * (4 * n * n + 4 * n * d)


def test_bounds_at_given_limits() -> None:
    limits = ("--matmul-tflops", "100", "--copy-gbps", "1000")
    long = explain(*CALL, *limits)
    forward = long["bound"]["forward"]
    assert long["limits"] == {"matmul_tflops": 100.0, "copy_gbps": 1000.0, "source": "given"}
    assert forward["compute_ms"] == pytest.approx(long["flops"]["forward"] / 1e14 * 1e3)
    assert forward["memory_ms"] == pytest.approx(long["traffic"]["forward"]["at least"] / 1e12 * 1e3)
    assert forward["bound"] == "compute"
    decode = explain("q=8,1,32,128", "k=8,4096,32,128", "--device", "cuda", *limits)
    assert decode["bound"]["forward"]["bound"] == "memory"


def test_default_limits_are_named() -> None:
    assert explain(*CALL)["limits"] == {"matmul_tflops": 800.0, "copy_gbps": 3020.0, "source": "an H100 SXM, bfloat16"}
    assert "measured" in explain("q=1,64,1,16", "--device", "cpu")["limits"]["source"]


@pytest.mark.parametrize("backend", ["hopper", "triton", "blocked", "reference"])
def test_every_backend_can_be_explained(backend: str) -> None:
    result = explain("q=1,300,4,64", "k=1,300,2,64", *CALL[2:6], "--backend", backend, "--prefix", "64")
    assert result["backend"] == backend
    assert result["traffic"]["forward"]["this kernel"] > 0
    assert result["traffic"]["backward"]["this kernel"] > 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--prefix", "40"), "table"),
        (("--chunk", "64,8"), "table"),
        (("--documents", "100,28"), "table"),
        (("--softcap", "30"), "softcap30"),
        (("--alibi",), "alibi"),
        (("--bias", "1,4,128,128"), "bias:additive"),
        (("--sinks",), "sinks"),
        (("--dropout", "0.1"), "dropout0.1"),
    ],
)
def test_features_reach_the_problem(arguments: tuple[str, ...], text: str) -> None:
    assert text in explain("q=1,128,4,64", "--device", "cuda", *arguments)["problem"]


def test_a_call_that_nobody_serves_exits_with_1() -> None:
    arguments = ["explain", "q=1,64,2,64", "--dtype", "fp64", "--device", "cuda", "--backend", "triton"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["backend"] is None
    assert "float64" in found["backends"]["triton"]
    text = CliRunner().invoke(app, arguments)
    assert text.exit_code == 1
    assert "no backend serves this call" in text.output


@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_one_subprocess_run_with_its_picture_and_registers(backend: str) -> None:
    """Compiling is what a process without the interpreter can do."""
    done = subprocess.run(
        [sys.executable, "-m", "flashtile", "explain", *CALL, "--causal", "--backend", backend, "--compile", "sm_90"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr
    for part in (
        f"{backend}  chosen",
        "██▒▒··",
        "standard",
        "FlashAttention-1",
        "each tensor once",
        "bound by compute",
        "registers",
    ):
        assert part in done.stdout
