"""One workload, one mode, all peers: the gate, then the clock. Gives one row for each peer."""

from __future__ import annotations

import contextlib
import gc
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
NO_KERNEL = "No available kernel"


@dataclass
class Contest:
    """Peers that meet over one workload in one mode: forward, backward, train (both at once) or host."""

    work: Workload
    mode: str
    setting: Setting
    limits: Limits
    seconds: float
    seed: int
    _expected: dict[bool, list[gate.Expected]] = field(default_factory=dict)

    def rows(self, peers: list[Peer], step: Step) -> list[Result]:
        """A row for each peer. On a CPU those that pass the gate are timed in turns, elsewhere one after the other."""
        inputs = self._inputs()
        rows, ready = [], []
        for peer in peers:
            step(f"{self.work.id} {self.mode}: {peer.name}")
            row = self._start(peer)
            rows.append(row)
            prepared = None if inputs is None else self._admit(peer, inputs, row)
            if inputs is None:
                row.update(status="refused", reason="not enough memory for the inputs")
            if prepared is not None and self._in_turns:
                ready.append((row, prepared))
            elif prepared is not None:
                try:
                    self._clock([(row, prepared)])
                except REFUSALS as error:  # repeated backwards keep what the gate's single one could let go
                    row.update(_failure(error, []))
                del prepared
                self._release()
        if ready:
            step(f"{self.work.id} {self.mode}: {len(ready)} in turns")
            self._clock(ready)
        return rows

    @property
    def _in_turns(self) -> bool:
        return self.setting.device == "cpu" and self.mode != "host"

    def _inputs(self) -> Inputs | None:
        """The tensors; None where they and their gradients would not fit."""
        free = machine.free_memory(self.setting.device)
        mode = "train" if self.setting.backward else "forward"
        needed = 2 * costs.compulsory_bytes(self.work, self.setting.dtype, mode)
        if free is not None and needed > free:
            return None
        return make_inputs(self.work, self.setting.dtype, self.setting.device, self.seed)

    def _start(self, peer: Peer) -> Result:
        row: Result = {
            "case": self.work.id,
            "feature": self.work.feature,
            "peer": peer.name,
            "own": isinstance(peer, Flashtile),
            "mode": self.mode,
            "dtype": str(self.setting.dtype).removeprefix("torch."),
            "call": asdict(self.work),
            "status": None,
            "reason": None,
        }
        if isinstance(peer, Flashtile):
            capability = machine.capability(self.setting.device)
            problem = self.work.problem(self.setting.dtype, self.setting.device, capability)
            with contextlib.suppress(NotImplementedError):
                row["backend"] = choose(problem, peer.backend)
        return row

    def _admit(self, peer: Peer, inputs: Inputs, row: Result) -> Prepared | None:
        """The peer's prepared call where it can do it and is right; else the row says why not."""
        reason = peer.refuses(self.work, self.setting)
        if reason is not None:
            row.update(status="refused", reason=reason)
            return None
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                prepared = self._pass_gate(peer, inputs, row)
            except Exception as error:
                row.update(_failure(error, [str(warning.message) for warning in said]))
                prepared = None
        if prepared is None:
            self._release()
        return prepared

    def _pass_gate(self, peer: Peer, inputs: Inputs, row: Result) -> Prepared | None:
        prepared = peer.prepare(self.work, inputs, self.setting.backward)
        checked, work = prepared, self.work
        if work.dropout_p > 0 and not peer.drops_alike:
            row["gate_note"] = "checked without dropout, whose random pattern is the peer's own"
            work = replace(work, dropout_p=0.0)
            checked = peer.prepare(work, inputs, self.setting.backward)
            prepared.results(self.setting.backward, self.work)  # it must not fail later, under the clock
        torch.manual_seed(inputs.seed)
        results = checked.results(self.setting.backward, work)
        right, row["gate"] = gate.check(results, self._expectations(inputs, drops=work.dropout_p > 0))
        if right:
            return prepared
        name, worst = max(row["gate"].items(), key=lambda entry: entry[1]["ratio"])
        row.update(status="wrong", reason=f"{name}: error {worst['error']:.3g}, allowed {worst['allowed']:.3g}")
        return None

    def _expectations(self, inputs: Inputs, drops: bool) -> list[gate.Expected]:
        if drops not in self._expected:
            self._expected[drops] = gate.expectations(self.work, inputs, self.setting.backward, drops, self.seed)
        return self._expected[drops]

    def _clock(self, ready: list[tuple[Result, Prepared]]) -> None:
        """Adds time, speed and memory to the rows."""
        device = self.setting.device
        tasks = [Task(prepared, self.mode) for _, prepared in ready]
        if self.mode == "host":
            results = [timing.host_times(task, device) for task in tasks]
        else:
            results = timing.device_times(tasks, device, self.seconds)
        for (row, prepared), times in zip(ready, results, strict=True):
            row["status"] = "measured"
            middle, low, high = timing.quantiles(times)
            if self.mode == "host":
                row.update(host_us=middle, host_us_q20=low, host_us_q80=high, repeats=len(times))
                continue
            row.update(ms=middle, ms_q20=low, ms_q80=high, repeats=len(times))
            row.update(self._speed(middle))
            row.update(self._memory(prepared))

    def _speed(self, ms: float) -> Result:
        flops = costs.flops(self.work, self.mode)
        moved = costs.compulsory_bytes(self.work, self.setting.dtype, self.mode)
        tflops, gbps = flops / ms / 1e9, moved / ms / 1e6
        return {
            "flops": flops,
            "bytes": moved,
            "tflops": tflops,
            "gbps": gbps,
            "matmul_share": tflops / self.limits.matmul_tflops,
            "copy_share": gbps / self.limits.copy_gbps,
        }

    def _memory(self, prepared: Prepared) -> Result:
        """peak_bytes: beyond the inputs, of a forward, or of a forward and a backward. extra_bytes: without results."""
        task = Task(prepared, "train" if self.setting.backward else "forward")
        with task.context():
            peak = timing.peak_bytes(task, self.setting.device)
        if peak is None:
            return {"peak_bytes": None, "extra_bytes": None}
        peak += prepared.held_bytes
        results = prepared.dout.nbytes
        if self.setting.backward:
            results += sum(leaf.nbytes for leaf in prepared.leaves.values())
        return {"peak_bytes": peak, "extra_bytes": max(0, peak - results)}

    def _release(self) -> None:
        gc.collect()
        if self.setting.device == "cuda":
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
    refused = isinstance(error, REFUSALS) or NO_KERNEL in str(error)
    text = str(error).strip().split("\n")[0] or type(error).__name__
    if NO_KERNEL in text:
        reasons = (line.partition(" (Triggered internally")[0] for line in said)
        text = " ".join(line for line in dict.fromkeys(reasons) if "because" not in line) or text
    name = "" if refused else f"{type(error).__name__}: "
    return {"status": "refused" if refused else "error", "reason": f"{name}{text}"[:400]}
