"""One workload, one mode, all peers: the gate, then the clock. Gives one row for each peer."""

from __future__ import annotations

import contextlib
import gc
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from flashtile.cli import costs, gate, machine, timing
from flashtile.cli.console import Result, Step
from flashtile.cli.limits import Limits
from flashtile.cli.peers import Flashtile, Peer, Prepared, Setting
from flashtile.cli.workload import Inputs, Workload, make_inputs
from flashtile.dispatch import choose

REFUSALS = (NotImplementedError, torch.OutOfMemoryError)
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
NO_KERNEL = re.compile("No available kernel|No viable backend")
GRADIENT_MODES = ("backward", "train")
ROOM = 8  # times the memory of one call


Entry = tuple[Result, Prepared]


@dataclass
class Contest:
    """Peers that meet over one workload, in some of the modes forward, backward, train (both at once) or in host.

    A peer is prepared and judged once for all modes, with gradients where a mode needs them; one that cannot do these
    is tried again for its forward alone.
    """

    work: Workload
    modes: tuple[str, ...]
    device: str
    dtype: torch.dtype
    limits: Limits
    seconds: float
    seed: int
    _expected: dict[tuple[bool, bool], list[gate.Expected]] = field(default_factory=dict)

    def rows(self, peers: list[Peer], step: Step) -> list[Result]:
        """A row for each mode and peer. The right ones are timed in turns, or one after the other where memory is short
        or the host's time is asked for.
        """
        inputs = self._inputs()
        rows: list[Result] = []
        waiting: list[Entry] = []
        for peer in peers:
            step(f"{self.work.id}: {peer.name}")
            own = {mode: self._start(peer, mode) for mode in self.modes}
            rows += own.values()
            if inputs is None:
                for row in own.values():
                    row.update(status="refused", reason="not enough memory for the inputs")
                continue
            for modes in self._attempts():
                pending = {mode: own[mode] for mode in modes if own[mode]["status"] not in ("ready", "measured")}
                waiting += self._attempt(peer, inputs, pending)
        for mode in self.modes:
            ready = [(row, prepared) for row, prepared in waiting if row["mode"] == mode]
            if ready:
                step(f"{self.work.id}, {mode}: {len(ready)} in turns")
                self._clock_together(ready, mode)
        return sorted(rows, key=lambda row: self.modes.index(row["mode"]))

    def _attempts(self) -> list[tuple[str, ...]]:
        """All modes together; then what needs no gradient, for those who have none."""
        alone = tuple(mode for mode in self.modes if mode not in GRADIENT_MODES)
        return [self.modes] if alone in ((), self.modes) else [self.modes, alone]

    def _attempt(self, peer: Peer, inputs: Inputs, rows: dict[str, Result]) -> list[Entry]:
        """Judges a peer for the modes of these rows; returned is what to time in turns, the rest is timed here."""
        if not rows:
            return []
        backward = any(mode in GRADIENT_MODES for mode in rows)
        verdict, prepared = self._admit(peer, inputs, backward)
        for row in rows.values():
            row.update({"reason": None, **verdict})
        if prepared is None:
            return []
        if "host" not in rows and self._holds_all():
            return [(row, prepared) for row in rows.values()]
        for mode, row in rows.items():
            self._clock_alone(row, prepared, mode)
        del prepared
        self._release()
        return []

    def _inputs(self) -> Inputs | None:
        """The tensors; None where they and their gradients would not fit."""
        free = machine.free_memory(self.device)
        mode = "train" if any(mode in GRADIENT_MODES for mode in self.modes) else "forward"
        needed = 2 * costs.compulsory_bytes(self.work, self.dtype, mode)
        if free is not None and needed > free:
            return None
        return make_inputs(self.work, self.dtype, self.device, self.seed)

    def _start(self, peer: Peer, mode: str) -> Result:
        row: Result = {
            "case": self.work.id,
            "feature": self.work.feature,
            "peer": peer.name,
            "own": isinstance(peer, Flashtile),
            "mode": mode,
            "dtype": str(self.dtype).removeprefix("torch."),
            "call": asdict(self.work),
            "status": None,
            "reason": None,
        }
        if isinstance(peer, Flashtile):
            problem = self.work.problem(self.dtype, self.device, machine.capability(self.device))
            with contextlib.suppress(NotImplementedError):
                row["backend"] = choose(problem, peer.backend)
        return row

    def _admit(self, peer: Peer, inputs: Inputs, backward: bool) -> tuple[Result, Prepared | None]:
        """What the rows say of a peer, and its prepared call where it can do it and is right."""
        reason = peer.refuses(self.work, Setting(self.device, self.dtype, backward))
        if reason is not None:
            return {"status": "refused", "reason": reason}, None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                verdict, prepared = self._pass_gate(peer, inputs, backward)
            except Exception as error:
                verdict, prepared = _failure(error, [str(warning.message) for warning in said]), None
        if verdict["status"] != "ready":
            prepared = None
            self._release()
        return verdict, prepared

    def _pass_gate(self, peer: Peer, inputs: Inputs, backward: bool) -> tuple[Result, Prepared]:
        prepared = peer.prepare(self.work, inputs, backward)
        checked, work = prepared, self.work
        verdict: Result = {"status": "ready"}
        if work.dropout_p > 0 and not peer.drops_alike:
            verdict["gate_note"] = "checked without dropout, whose random pattern is the peer's own"
            work = replace(work, dropout_p=0.0)
            checked = peer.prepare(work, inputs, backward)
            prepared.results(backward, self.work)  # it must not fail later, under the clock
        torch.manual_seed(inputs.seed)
        results = checked.results(backward, work)
        expected = self._expectations(inputs, backward, work.dropout_p > 0)
        slack = 1.0 if isinstance(peer, Flashtile) else gate.PEER_SLACK
        right, verdict["gate"] = gate.check(results, expected, slack)
        if not right:
            name, worst = max(verdict["gate"].items(), key=lambda entry: entry[1]["ratio"])
            reason = f"{name}: error {worst['error']:.3g}, allowed {worst['allowed']:.3g}"
            verdict.update(status="wrong", reason=reason)
        return verdict, prepared

    def _expectations(self, inputs: Inputs, backward: bool, drops: bool) -> list[gate.Expected]:
        key = (backward, drops)
        if key not in self._expected:
            self._expected[key] = gate.expectations(self.work, inputs, backward, drops, self.seed)
        return self._expected[key]

    def _clock(self, ready: list[Entry], mode: str) -> None:
        """Adds time, speed and memory to the rows."""
        tasks = [Task(prepared, mode) for _, prepared in ready]
        if mode == "host":
            results = timing.host_times(tasks, self.device)
        else:
            results = timing.device_times(tasks, self.device, self.seconds)
        del tasks
        for (row, prepared), times in zip(ready, results, strict=True):
            middle, low, high = timing.quantiles(times)
            if mode == "host":
                row.update(host_us=middle, host_us_q20=low, host_us_q80=high)
            else:
                row.update(
                    ms=middle, ms_q20=low, ms_q80=high, **self._speed(mode, middle), **self._memory(mode, prepared)
                )
            row.update(status="measured", repeats=len(times))

    def _holds_all(self) -> bool:
        """Whether there is memory for the tensors of all peers at once, which is what they need to take turns."""
        free = machine.free_memory(self.device)
        return (
            free is None or self.device == "cpu" or free > ROOM * costs.compulsory_bytes(self.work, self.dtype, "train")
        )

    def _clock_together(self, ready: list[Entry], mode: str) -> None:
        try:
            self._clock(ready, mode)
        except REFUSALS:  # one of them needs more memory than the others leave it, or more than there is
            for row, prepared in ready:
                self._release()
                self._clock_alone(row, prepared, mode)

    def _clock_alone(self, row: Result, prepared: Prepared, mode: str) -> None:
        try:
            self._clock([(row, prepared)], mode)
        except REFUSALS as error:  # repeated backwards keep what the gate's single one could let go
            row.update(_failure(error, []))

    def _speed(self, mode: str, ms: float) -> Result:
        flops = costs.flops(self.work, mode)
        moved = costs.compulsory_bytes(self.work, self.dtype, mode)
        tflops, gbps = flops / ms / 1e9, moved / ms / 1e6
        return {
            "flops": flops,
            "bytes": moved,
            "tflops": tflops,
            "gbps": gbps,
            "matmul_share": tflops / self.limits.matmul_tflops,
            "copy_share": gbps / self.limits.copy_gbps,
        }

    def _memory(self, mode: str, prepared: Prepared) -> Result:
        """peak_bytes: beyond the inputs, of a forward, or of a forward and a backward. extra_bytes: without results."""
        backward = mode in GRADIENT_MODES
        task = Task(prepared, "train" if backward else "forward")
        with task.context():
            peak = timing.peak_bytes(task, self.device)
        if peak is None:
            return {"peak_bytes": None, "extra_bytes": None}
        peak += prepared.held_bytes
        results = prepared.dout.nbytes
        if backward:
            results += sum(leaf.nbytes for leaf in prepared.leaves.values())
        return {"peak_bytes": peak, "extra_bytes": max(0, peak - results)}

    def _release(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


class Task:
    """What is timed: a prepared call in a mode. `context` is entered around it, outside of the clock."""

    def __init__(self, prepared: Prepared, mode: str) -> None:
        self._prepared = prepared
        self._mode = mode
        self._leaves = list(prepared.leaves.values())
        self._out = None
        if mode == "backward":
            with prepared.context():
                self._out = prepared.call()

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        with self._prepared.context(), torch.set_grad_enabled(self._mode in ("backward", "train")):
            yield

    def __call__(self) -> Any:
        if self._out is not None:
            return torch.autograd.grad(self._out, self._leaves, self._prepared.dout, retain_graph=True)
        return self._prepared.train() if self._mode == "train" else self._prepared.call()


def _failure(error: Exception, said: list[str]) -> Result:
    """A refusal or an error, in one line; PyTorch says in warnings why a backend of its attention refuses."""
    refused = isinstance(error, REFUSALS) or NO_KERNEL.search(str(error)) is not None
    text = COLOURS.sub("", str(error)).strip().split("\n")[0] or type(error).__name__
    if NO_KERNEL.search(text):
        reasons = (line.partition(" (Triggered internally")[0] for line in said)
        text = " ".join(line for line in dict.fromkeys(reasons) if "because" not in line) or text
    name = "" if refused else f"{type(error).__name__}: "
    return {"status": "refused" if refused else "error", "reason": f"{name}{text}"[:400]}
