"""Races in the Hopper kernels are looked for: repeated runs, warps that come late, and a planted race that is seen.

Bits are compared, so the backward is the deterministic one, but where a block of dQ is stored by whoever comes first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import mutants
import pytest
import torch
from mutants import DELAYED, UNSAFE, Mutant
from places import hopper_plans_anew, on_hopper
from process import fresh_process
from torch import Tensor

import flashtile
from flashtile.backends.hopper.configs import MULTIPROCESSORS
from flashtile.masks import Causal, Window
from flashtile.testing import Case, build, evaluate

REPEATS = 250
ROUNDING = 5e-5  # of dQ, whose float32 sums depend on their order in the last bits; under a mask 2e-5 was seen
FEW = 2  # programs, of which each takes several items

# Several tiles of queries and of keys in each, and more turns than the rings have slots.
CASES = (
    Case(
        "causal", "the common layer", q_len=700, k_len=700, heads=4, kv_heads=2, dim=64, mask=Causal(),
        deterministic=True,
    ),
    Case("uneven", "head dims that differ", q_len=300, k_len=900, dim=128, v_dim=64, dlse=True, deterministic=True),
    Case(
        "wide", "a gradient to each consumer", q_len=500, k_len=300, heads=4, kv_heads=2, dim=256, mask=Causal(),
        deterministic=True,
    ),
    Case(
        "latent", "two launches, each with items of its own", q_len=700, k_len=700, heads=4, kv_heads=2, dim=192,
        v_dim=128, mask=Causal(), deterministic=True,
    ),
    Case(
        "relay", "sums that wait in memory", q_len=500, k_len=300, heads=8, kv_heads=2, dim=256, mask=Causal(),
        deterministic=True,
    ),
    Case(
        "relay-latent", "", q_len=700, k_len=700, heads=6, kv_heads=2, dim=192, v_dim=128, mask=Causal(),
        deterministic=True,
    ),
    Case(
        "relay-128", "", batch=1, q_len=260, k_len=1030, heads=136, kv_heads=17, dim=128, mask=Causal(),
        deterministic=True,
    ),
    Case(
        "mirrored", "walks from either end", q_len=1000, k_len=1024, heads=24, kv_heads=12, dim=128, mask=Causal(),
        deterministic=True,
    ),
    Case(
        "features", "everything that a consumer may wait for besides", q_len=500, k_len=600, heads=4, kv_heads=2,
        dim=128, mask=Window(200, 50), softcap=5.0, alibi="heads", bias="additive", bias_axes="1hqk", sinks=True,
        dropout_p=0.2, deterministic=True,
    ),
    Case(
        "varlen", "sequences of any number of tiles, also none", q_lens=(300, 0, 700, 20), k_lens=(700, 90, 400, 200),
        heads=4, kv_heads=2, dim=128, mask=Causal(), deterministic=True,
    ),
)  # fmt: skip

# The first tile of keys that comes to a block of dQ stores it: walks are short, and no order is asked for.
FIRST = (
    Case("first", "many tiles at a time", q_len=1000, k_len=1000, heads=8, dim=128, mask=Causal()),
    Case("first-around", "walks that begin with rows of their own", q_len=1000, k_len=768, heads=8, dim=128),
    Case("first-wide", "steps of one block", q_len=1000, k_len=1000, heads=8, dim=256, mask=Causal()),
    Case("first-latent", "", q_len=1000, k_len=1000, heads=8, dim=192, v_dim=128, mask=Causal()),
    Case(
        "first-varlen", "rows that see nothing", q_lens=(300, 0, 700, 20), k_lens=(700, 90, 400, 200), heads=8, dim=128,
        mask=Window(200, 50),
    ),
)  # fmt: skip

OTHERS = (
    mutants.BETWEEN_ITEMS,
    mutants.LATE_STORES,
    mutants.UNAWAITED_STORES,
    mutants.UNAWAITED_TURNS,
    mutants.UNAWAITED_ROUNDS,
)

on_gpu = [pytest.mark.gpu(seconds=60.0), on_hopper]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def results(case: Case) -> dict[str, Tensor]:
    return evaluate(case, build(case, torch.bfloat16, "cuda"), "hopper")


def results_with_ordered_dq(case: Case) -> dict[str, Tensor]:
    """Those of the deterministic backward; but dk and dv only under a mask: else its walks begin with other rows."""
    ordered = results(replace(case, deterministic=True))
    if case.mask is not None:
        return ordered
    found = results(case)
    return {**ordered, "dk": found["dk"], "dv": found["dv"]}


def differing(found: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Names of results that differ in a bit."""
    return [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, over all of a tensor."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@contextmanager
def programs(at_most: int) -> Iterator[None]:
    """Kernels run in so many programs at most."""
    from flashtile.backends.hopper import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "multiprocessors", lambda device: at_most)
        with hopper_plans_anew():
            yield


class TestOnHopper:
    pytestmark = on_gpu

    @every_case
    @pytest.mark.parametrize("at_most", [FEW, MULTIPROCESSORS])
    def test_every_run_gives_the_same_bits(self, case: Case, at_most: int) -> None:
        inputs = build(case, torch.bfloat16, "cuda")
        expected = evaluate(case, inputs, "hopper")
        with programs(at_most):
            for _ in range(REPEATS):
                assert not differing(evaluate(case, inputs, "hopper"), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize("heads", [[0, 1, 2], [1], [2]])
    def test_items_that_overflow_are_done_again(self, dtype: torch.dtype, causal: bool, heads: list[int]) -> None:
        generator = torch.Generator("cuda").manual_seed(0)
        q, k, v = (torch.randn(2, 4100, 3, 64, device="cuda", generator=generator).to(dtype) for _ in range(3))
        k[1, 5, heads] = 200 * q[1, -1, heads]  # a leap for the rows that look alike, none for the others
        run = partial(flashtile.attention, q, k, v, causal=causal, backend="hopper", return_lse=True)
        out, lse = run()
        expected, expected_lse = flashtile.attention(
            q.double(), k.double(), v.double(), causal=causal, backend="blocked", return_lse=True
        )
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-4)
        for at_most in (1, FEW, MULTIPROCESSORS):
            with programs(at_most):
                for _ in range(20):
                    assert all(map(torch.equal, run(), (out, lse)))

    @pytest.mark.parametrize(
        ("mutant", "case"),
        [
            pytest.param(mutant, case, id=f"{mutant.name}-{case}")
            for mutant in DELAYED
            for case in CASES
            if mutant.reaches(case)
        ],
    )
    def test_late_warps_change_nothing(self, mutant: Mutant, case: Case, tmp_path: Path) -> None:
        expected = results(case)
        with mutants.planted(mutant, tmp_path), programs(FEW):
            assert not differing(results(case), expected)

    @pytest.mark.parametrize("mutant", UNSAFE, ids=lambda mutant: mutant.name)
    def test_a_missing_wait_is_seen(self, mutant: Mutant, tmp_path: Path) -> None:
        case = next(case for case in CASES if mutant.reaches(case))
        expected = results(case)
        with mutants.planted(mutant, tmp_path):
            wrong = differing(results(case), expected)
        assert set(wrong) >= ({"out", "lse"} if mutant.mode == "forward" else {"dq", "dk"})
        assert not differing(results(case), expected)

    @pytest.mark.parametrize("case", FIRST, ids=str)
    @pytest.mark.parametrize("at_most", [FEW, MULTIPROCESSORS])
    def test_blocks_of_dq_are_stored_before_others_add(self, case: Case, at_most: int, tmp_path: Path) -> None:
        inputs = build(case, torch.bfloat16, "cuda")
        expected = results_with_ordered_dq(case)
        with programs(at_most):
            for _ in range(REPEATS):
                found = evaluate(case, inputs, "hopper")
                assert differing(found, expected) in ([], ["dq"])
                assert error(found["dq"], expected["dq"]) < ROUNDING
        with mutants.planted(mutants.LATE_STORES, tmp_path), programs(at_most):
            assert error(evaluate(case, inputs, "hopper")["dq"], expected["dq"]) < ROUNDING

    @pytest.mark.parametrize("case", FIRST, ids=str)
    def test_a_missing_wait_for_a_block_of_dq_is_seen(self, case: Case, tmp_path: Path) -> None:
        expected = results_with_ordered_dq(case)
        with mutants.planted(mutants.UNAWAITED_STORES, tmp_path):
            found = results(case)
        assert differing(found, expected) == ["dq"]
        assert error(found["dq"], expected["dq"]) > 100 * ROUNDING

    # A window lets three tiles of keys see a row: in another order their sum rounds to the same bits.
    @pytest.mark.parametrize("case", [case for case in CASES if case.id != "features"], ids=str)
    def test_a_missing_wait_for_a_turn_is_seen(self, case: Case, tmp_path: Path) -> None:
        expected = results(case)
        with mutants.planted(mutants.UNAWAITED_TURNS, tmp_path):
            assert differing(results(case), expected) == ["dq"]

    @pytest.mark.parametrize("case", [case for case in CASES if mutants.relays(case)], ids=str)
    def test_a_missing_wait_for_a_round_is_seen(self, case: Case, tmp_path: Path) -> None:
        expected = results(case)
        with mutants.planted(mutants.UNAWAITED_ROUNDS, tmp_path):
            wrong = differing(results(case), expected)
        assert wrong == (["dk"] if case.v_dim == 128 else ["dk", "dv"])
        assert not differing(results(case), expected)

    def test_a_missing_wait_between_items_is_seen(self, tmp_path: Path) -> None:
        case = next(case for case in CASES if case.dim == 128)  # where a warp of its own loads
        expected = results(case)
        with mutants.planted(mutants.BETWEEN_ITEMS, tmp_path), programs(FEW):
            wrong = differing(results(case), expected)
        assert set(wrong) >= {"dq", "dk", "dv"}
        assert not differing(results(case), expected)


def test_the_comparison_sees_one_bit() -> None:
    zero = {"out": torch.zeros(3), "lse": torch.zeros(2)}
    assert not differing(zero, zero)
    assert differing({**zero, "out": torch.tensor([0.0, 1e-45, 0.0])}, zero) == ["out"]
    assert differing({**zero, "lse": torch.tensor([0.0, torch.nan])}, zero) == ["lse"]


@pytest.mark.parametrize("mutant", [*DELAYED, *UNSAFE, *OTHERS], ids=lambda mutant: mutant.name)
def test_every_mutant_can_be_made(mutant: Mutant) -> None:
    """What it replaces stands in today's source, and each copy is Python that differs from the original."""
    texts = mutants.sources(mutant)
    assert list(texts) == list(mutants.COPIED[mutant.mode])
    for file, text in texts.items():
        compile(text, file, "exec")
    for edit in mutant.edits:
        assert edit.new in texts[edit.file]


def test_a_text_that_does_not_occur_is_an_error() -> None:
    stale = Mutant("stale", "forward", (mutants.Edit("forward_kernel", "pipes.keys.hope_for(n)", "pass"),))
    with pytest.raises(LookupError, match=r"stale: 'pipes.keys.hope_for\(n\)' does not occur in forward_kernel.py"):
        mutants.sources(stale)


COMPILED = """
import json, sys
from pathlib import Path
import torch
import binaries, mutants
from flashtile.backends.hopper import compile

problem = next(binaries.hopper_problems(True))

def sleeps(mode):
    return binaries.occurrences("NANOSLEEP", compile.compiled(mode, problem).asm["cubin"])

mode = sys.argv[1]
mutant = next(mutant for mutant in mutants.UNSAFE if mutant.mode == mode)
counts = [sleeps(mode)]
with mutants.planted(mutant, Path(sys.argv[2])):
    counts.append(sleeps(mode))
counts.append(sleeps(mode))
print(json.dumps(counts))
"""


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_mutants_compile_and_are_gone_afterwards(mode: str, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    paths = f"{root / 'src'}:{root / 'tests'}"
    before, within, after = json.loads(
        fresh_process(COMPILED, mode, str(tmp_path), TRITON_INTERPRET="0", PYTHONPATH=paths).splitlines()[-1]
    )
    assert before == after == 0
    assert within > 0
