"""Memory is linear in sequence length: peaks measured in processes of their own, and what is saved for the backward."""

from __future__ import annotations

import sys

import pytest
import torch
from places import every_place
from process import fresh_process

import flashtile
from flashtile.masks import Causal

# Prints the bytes that one forward and backward takes at its peak beyond inputs, result and gradients. Linux counts the
# peak of resident memory, and starts to count anew when 5 is written to clear_refs.
PROBE = """
import sys, torch, flashtile
from flashtile.masks import Prefix

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def attend(q, k, v):
    if kind == "standard":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return (torch.softmax(q @ k.transpose(-1, -2), -1) @ v).transpose(1, 2)
    features = {"full": {}, "causal": {"causal": True}, "table": {"mask": Prefix(100)}}[kind]
    return flashtile.attention(q, k, v, backend="blocked", **features)

def run(length):
    torch.set_num_threads(1)
    q, k, v = (torch.randn(1, length, heads, 64, dtype=dtype, requires_grad=True) for heads in (2, 1, 1))
    if kind == "standard":
        k, v = (t.detach().expand(1, length, 2, 64).requires_grad_() for t in (k, v))
    dout = torch.randn(1, length, 2, 64, dtype=dtype)
    open("/proc/self/clear_refs", "w").write("5")
    before = resident("VmRSS")
    out = attend(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    kept = sum(t.numel() * t.element_size() for t in (out, *grads))
    return resident("VmHWM") - before - kept

kind, dtype = sys.argv[1], getattr(torch, sys.argv[2])
run(256)  # what libraries allocate once
print(run(int(sys.argv[3])))
"""

MEGABYTE = 2**20

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read from /proc")


def peak(kind: str, dtype: str, length: int) -> int:
    return int(fresh_process(PROBE, kind, dtype, str(length)))


def check_linear(kind: str, dtype: str) -> None:
    """Four times the length takes at most five times the memory; 8 MB of noise are free."""
    short, long = peak(kind, dtype, 2048), peak(kind, dtype, 8192)
    quadratic = 2 * 8192**2 * 4
    assert long < quadratic / 8, f"{long / MEGABYTE:.0f} MB at 8192"
    assert long <= 5 * max(short, 0) + 8 * MEGABYTE, f"{short / MEGABYTE:.0f} MB at 2048, {long / MEGABYTE:.0f} at 8192"


@linux_only
@pytest.mark.parametrize(("kind", "dtype"), [("full", "float32"), ("causal", "bfloat16"), ("table", "float32")])
def test_peak_on_the_cpu(kind: str, dtype: str) -> None:
    """Forward and backward of the blocked backend, two query heads over one key-value head."""
    check_linear(kind, dtype)


@linux_only
def test_the_check_rejects_standard_attention() -> None:
    with pytest.raises(AssertionError, match="MB at"):
        check_linear("standard", "float32")


@every_place
def test_only_inputs_and_results_are_saved(backend: str, device: str) -> None:
    """q, k, v, out and lse; no score matrix, no dropout mask, no expanded head."""
    q = torch.randn(1, 96, 4, 16, device=device, requires_grad=True)
    k, v = (torch.randn(1, 80, 2, 16, device=device, requires_grad=True) for _ in range(2))
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out, lse = flashtile.attention(q, k, v, mask=Causal(), dropout_p=0.1, return_lse=True, backend=backend)
    state = 2 * 8  # dropout's seed and offset
    assert sum(saved.values()) <= sum(t.numel() * t.element_size() for t in (q, k, v, out, lse)) + state
