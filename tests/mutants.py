"""The Hopper kernels with a change planted in a copy of their source: warps that come late, a wait that is missing."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from flashtile.testing import Case

SOURCES = Path(__file__).parent.parent / "src" / "flashtile" / "backends" / "hopper"

# Files that are copied for a direction, each after those that it imports; the last one has the kernel.
COPIED = {
    "forward": ("forward_load", "forward_kernel"),
    "backward": (
        "backward_step",
        "backward_wide",
        "backward_split",
        "backward_relay",
        "backward_load",
        "backward_turns",
        "backward_reduce",
        "backward_kernel",
    ),
}

# What every copy gets. `late` delays the calling warps irregularly, longer than a tile takes to arrive.
SLEEP = """

@gluon.jit
def sleep(nanoseconds):
    gl.inline_asm_elementwise(
        "nanosleep.u32 $1; mov.u32 $0, 0;", "=r,r", [nanoseconds], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def late(n):
    sleep(n % 3 * 5000)
"""


class Edit(NamedTuple):
    """`old` becomes `new` wherever it stands in a file of the backend."""

    file: str
    old: str
    new: str


class Mutant(NamedTuple):
    """consumers: the file of those of the backward that run what is changed, or of the relay between their items."""

    name: str
    mode: str
    edits: tuple[Edit, ...]
    consumers: str = "backward_step"

    def reaches(self, case: Case) -> bool:
        """True where a call runs what is changed."""
        if self.consumers == "backward_relay":
            return relays(case)
        return self.mode == "forward" or self.consumers == consumers(case)


def consumers(case: Case) -> str:
    """Whose consumers serve the backward of a call without softcap and bias."""
    if case.dim <= 128:
        return "backward_step"
    return "backward_split" if case.v_dim == 128 else "backward_wide"


def relays(case: Case) -> bool:
    """True where each query head of a group comes in a round of its own, in a deterministic call."""
    group = case.heads // (case.kv_heads or case.heads)
    return group >= 8 if case.dim == 128 else case.dim > 128 and group > 2


def before(file: str, line: str, added: str) -> Edit:
    """`added` on a line of its own before `line`, which says how far both are indented."""
    indent = " " * (len(line) - len(line.lstrip()))
    return Edit(file, f"\n{line}\n", f"\n{indent}{added}\n{line}\n")


def after(file: str, line: str, added: str, deeper: int = 0) -> Edit:
    """`added` on a line of its own after `line`."""
    indent = " " * (len(line) - len(line.lstrip()) + deeper)
    return Edit(file, f"\n{line}\n", f"\n{line}\n{indent}{added}\n")


_CLAIM_KEYS = "        full = pipes.keys.arrival(n)"
_CLAIM_QUERIES = "        full = pipes.queries.claim(n, QUERY_BYTES + BIAS_BYTES)"
_AWAIT_KEYS = "        pipes.keys.await_full(n)"
_USE_KEYS = (  # and the values before them
    "        s = pipes.issue_scores(work, n, rows.WG)",
    "        running = pipes.issue_output(p16, n, o)",
    "        s = warpgroup_mma_wait(1, deps=(s,))",
)
_WALK = "    for tile in range(span[3] - 2, span[0] - 1, -1):"
_WAIT = "    q = pipes.queries.wait(n)"
_TAKE_SCORES = "            pipes.scores.await_full(n)"
_HAND_OVER = "    pipes.scores_of(n, 0).store(handed)"
_TAKE_OVER = "    weights.await_full(n)"
_AWAIT_DONE = "    pipes.await_done(turn)"
_WEIGH = "    bits = kept_bits(m, keys, scoring)"
_SCORE = "    pipes.scores.await_empty(n)"
_PASS_ON = "                turns.say(block)"
_LEAVE = "        gl.store(at, sums, mask=place.key(w) < place.k_len)"
_TAKE_ITEM = "        place, spans = items.take(turn, mask, 1)"
_TAKE_ITEM_WITHOUT_LOADER = "            place, spans = items.take(turn, mask, 4)"

DELAYED = (
    Mutant("late producer", "forward", (before("forward_load", _CLAIM_KEYS, "late(n)"),)),
    *(
        Mutant(
            f"late consumer {w}",
            "forward",
            (after("forward_kernel", _WALK, f"late(n * (rows.first // 64 % pipes.GROUPS == {w}))", 4),),
        )
        for w in (0, 1)
    ),
    Mutant("late loads", "backward", (before("backward_load", _CLAIM_QUERIES, "late(n)"),)),
    *(
        Mutant(f"late keys {w}", "backward", (before("backward_step", _WAIT, f"late(n * (WG == {w}))"),))
        for w in (0, 1)
    ),
    Mutant("late dq", "backward", (after("backward_reduce", _TAKE_SCORES, "late(n)"),)),
    Mutant("late gradients", "backward", (before("backward_kernel", _AWAIT_DONE, "late(turn + WG + 1)"),)),
    Mutant(
        "late items",
        "backward",
        (
            before("backward_load", _TAKE_ITEM, "late(turn)"),
            before("backward_reduce", _TAKE_ITEM_WITHOUT_LOADER, "late(turn)"),
        ),
    ),
    *(
        Mutant(f"late notices of {role}", "backward", (before("backward_turns", _PASS_ON, "late(n)"),), role)
        for role in ("backward_step", "backward_wide", "backward_split")
    ),
    Mutant("late wide dq", "backward", (after("backward_reduce", _TAKE_SCORES, "late(n)"),), "backward_wide"),
    Mutant("late weights", "backward", (before("backward_wide", _HAND_OVER, "late(n)"),), "backward_wide"),
    Mutant("late derivatives", "backward", (before("backward_wide", _TAKE_OVER, "late(n)"),), "backward_wide"),
    Mutant("late split loads", "backward", (before("backward_load", _CLAIM_QUERIES, "late(n)"),), "backward_split"),
    Mutant("late split items", "backward", (before("backward_load", _TAKE_ITEM, "late(turn)"),), "backward_split"),
    Mutant("late split dq", "backward", (after("backward_reduce", _TAKE_SCORES, "late(n)"),), "backward_split"),
    *(
        Mutant(
            f"late split consumer {w}",
            "backward",
            (
                before("backward_split", _WEIGH, f"late(n * (WG == {w}))"),
                before("backward_split", _SCORE, f"late((n + 1) * (WG == {w}))"),
            ),
            "backward_split",
        )
        for w in (0, 1, 2)
    ),
    Mutant("late sums", "backward", (before("backward_relay", _LEAVE, "late(place.tile + 1)"),), "backward_relay"),
    Mutant(
        "late split gradients",
        "backward",
        (before("backward_split", _AWAIT_DONE, "late(turn + WG + 1)"),),
        "backward_split",
    ),
)

# The tile comes late, and is used before anybody waits for it. Its slot is claimed in time, or waited for later, so
# that nobody waits forever either.
UNSAFE = (
    Mutant(
        "no wait for keys",
        "forward",
        (
            after("forward_load", _CLAIM_KEYS, "sleep(20000)"),
            Edit("forward_kernel", "\n".join((_AWAIT_KEYS, *_USE_KEYS)), "\n".join((*_USE_KEYS, _AWAIT_KEYS))),
        ),
    ),
    Mutant(
        "no wait for queries",
        "backward",
        (
            after("backward_load", _CLAIM_QUERIES, "sleep(20000)"),
            Edit("backward_step", "pipes.queries.wait(n)", "pipes.queries.slot(n)"),
        ),
    ),
    Mutant(
        "no wait for weights",
        "backward",
        (
            before("backward_wide", _HAND_OVER, "sleep(20000)"),
            Edit("backward_wide", "    weights.await_empty(n)\n", "    pass\n"),
            Edit("backward_wide", _TAKE_OVER, "    weights.await_empty(n)"),
        ),
        "backward_wide",
    ),
    Mutant(
        "no wait for panels",
        "backward",
        (
            after("backward_load", _CLAIM_QUERIES, "sleep(20000)"),
            Edit("backward_split", "pipes.queries.await_full(n)", "pass"),
        ),
        "backward_split",
    ),
)

# The next item's keys take the place of those that are still being multiplied.
BETWEEN_ITEMS = Mutant(
    "no wait for keys to be read",
    "backward",
    (
        Edit("backward_load", "ring.claim(number, ", "ring.expect(number, "),
        before("backward_reduce", _TAKE_SCORES, "sleep(2000)"),
    ),
)

# Others must wait until a block of dQ that was claimed is stored, and do not.
_STORE = "            store(self.dq, [at * (C // 4), 0], tile)"
LATE_STORES = Mutant("late stores", "backward", (before("backward_reduce", _STORE, "late(slot + 1)"),))
UNAWAITED_STORES = Mutant(
    "no wait for stores",
    "backward",
    (
        before("backward_reduce", _STORE, "sleep(1000 * at)"),  # the next tile, a few blocks behind, sleeps less
        Edit("backward_turns", "while state == CLAIMED:", "while state > STORED:"),
    ),
)

# Tiles of keys that are to add to a block of dQ first come last, and nobody waits for them.
UNAWAITED_TURNS = Mutant(
    "no wait for turns",
    "backward",
    (
        after("backward_reduce", _TAKE_SCORES, "sleep(50000 * place.tile * (i == first))"),
        Edit("backward_turns", "while count < before:", "while count < before - 1000:"),
    ),
)


# The sums of a round come late, and the next one does not wait for them.
UNAWAITED_ROUNDS = Mutant(
    "no wait for rounds",
    "backward",
    (
        before("backward_relay", _LEAVE, "sleep(100000)"),
        Edit("backward_relay", "while count < place.member:", "while count < place.member - 1000:"),
    ),
    "backward_relay",
)


def sources(mutant: Mutant) -> dict[str, str]:
    """The changed text of each copied file. Raises LookupError where a text to be replaced does not occur."""
    texts = {name: (SOURCES / f"{name}.py").read_text("utf-8") + SLEEP for name in COPIED[mutant.mode]}
    for file, old, new in mutant.edits:
        if old not in texts[file]:
            raise LookupError(f"{mutant.name}: {old.strip()!r} does not occur in {file}.py")
        texts[file] = texts[file].replace(old, new)
    return texts


@contextmanager
def planted(mutant: Mutant, folder: Path) -> Iterator[None]:
    """Calls of the backend run the mutant, and its compile module compiles it; folder: where its sources may lie."""
    from flashtile.backends.hopper import backward_pass, forward_pass, launch
    from flashtile.backends.hopper import compile as compiler

    name = f"{mutant.mode}_kernel"
    planted_kernel = getattr(_imported(mutant, folder), name)
    with pytest.MonkeyPatch.context() as patch:
        for place in (compiler, {"forward": forward_pass, "backward": backward_pass}[mutant.mode]):
            patch.setattr(place, name, planted_kernel)
        launch._kinds.clear()
        try:
            yield
        finally:
            launch._kinds.clear()


def _imported(mutant: Mutant, folder: Path) -> ModuleType:
    """The module with the kernel, importing the other copies in place of the files that they are copied from."""
    copies: dict[str, str] = {}
    for file, text in sources(mutant).items():
        for original, copied in copies.items():
            text = text.replace(f"from flashtile.backends.hopper.{original} import", f"from {copied} import")
        copies[file] = f"mutant_{mutant.name.replace(' ', '_')}_{file}"
        module = _load(copies[file], folder / f"{copies[file]}.py", text)
    return module


def _load(name: str, path: Path, text: str) -> ModuleType:
    path.write_text(text, "utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
