"""The Hopper kernels on small shapes, for tools that slow them down a thousandfold; not a test of its own.

    compute-sanitizer --tool memcheck python tests/sanitized.py
    compute-sanitizer --tool racecheck python tests/sanitized.py plain-128 wide
    TRITON_INSTRUMENTATION_MODE=consan python tests/sanitized.py --forward plain-64    # Triton's concurrency sanitizer

Every kind of kernel once: head dims, masks, packed sequences, all features together, the fixed order, errands, rounds;
in two programs, so that each hands over from item to item. Arguments: parts of names; --forward leaves the backward
out. Results are compared with float64 as everywhere, so that a tool's silence is about a run that was right. racecheck
reports the numbers that roles leave for each other (words.py), which mbarriers put in order; on an H100, plain-128 and
causal-256, nothing else. At head dim 64 it also reports the sums that consumers leave (work.py), in the same order, and
the arguments that Triton hands to the roles before they start.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch
import triton

from flashtile.backends.hopper import backward_configs, backward_pass, launch
from flashtile.masks import Causal, Chunked, Window
from flashtile.testing import Case, run_case

_SMALL = Case("small", "", q_len=200, k_len=330)
_ALL = {"softcap": 5.0, "alibi": "heads", "sinks": True, "dropout_p": 0.2, "dlse": True}

CASES = (
    *(replace(_SMALL, id=f"plain-{dim}", dim=dim) for dim in (64, 128, 256)),
    *(replace(_SMALL, id=f"causal-{dim}", dim=dim, heads=2, kv_heads=1, mask=Causal()) for dim in (64, 128, 256)),
    replace(_SMALL, id="leaps", dim=64, amplitude=300.0),  # items that are done again
    replace(_SMALL, id="window", dim=128, mask=Window(100, 20)),
    replace(_SMALL, id="table", dim=64, mask=Chunked(90, 10)),
    replace(_SMALL, id="table-short", q_len=80, k_len=80, dim=32, mask=Chunked(16, 6)),  # less than a tile of keys
    replace(_SMALL, id="bias", dim=128, bias="additive"),
    replace(_SMALL, id="features", dim=128, mask=Causal(), **_ALL),
    replace(_SMALL, id="deterministic", dim=64, mask=Causal(), deterministic=True),
    replace(_SMALL, id="wide", dim=192, mask=Causal(), deterministic=True),
    replace(_SMALL, id="latent", dim=192, v_dim=128, mask=Causal(), deterministic=True),
    replace(_SMALL, id="latent-errands", dim=192, v_dim=128, heads=2, mask=Causal()),
    replace(_SMALL, id="latent-window", dim=192, v_dim=128, mask=Window(100, 20), dropout_p=0.2),
    replace(_SMALL, id="relay", dim=256, heads=4, kv_heads=1, mask=Causal(), deterministic=True),
    replace(_SMALL, id="relay-latent", dim=192, v_dim=128, heads=8, kv_heads=1, mask=Causal()),
    replace(_SMALL, id="relay-128", batch=1, q_len=70, k_len=1030, dim=128, heads=136, kv_heads=17, mask=Causal()),
    replace(_SMALL, id="mirrored", k_len=256, dim=128, heads=4, kv_heads=2, mask=Causal(), deterministic=True),
    Case("varlen", "", q_lens=(100, 0, 70), k_lens=(90, 40, 130), dim=128, mask=Causal()),
)


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--forward"]
    backward = "--forward" not in sys.argv
    launch.multiprocessors = lambda device: 2
    backward_configs._has_time = lambda problem, rows: problem.bare  # errands are run, and dV comes in two halves
    backward_configs._ITEMS_OF_TWO = 0
    backward_pass._section_in_order = lambda *problem: 1
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))
    for case in CASES:
        if not words or any(word in case.id for word in words):
            print(run_case(case, "hopper", torch.bfloat16, "cuda", grads=backward), flush=True)


if __name__ == "__main__":
    main()
