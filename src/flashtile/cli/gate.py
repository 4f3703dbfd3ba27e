"""The correctness gate of `bench`: a peer's result against float64 on parts of the call, before its speed is taken.

Checked are whole key-value heads of sampled batch elements (for the forward alone: sampled query rows of them), since
every row of a head is computed by the same code. The error allowed is that of standard PyTorch attention in the same
dtype on the same rows, twice, and one rounding of the result; and, since standard attention may be right by luck, the
distance by which the exact result moves when every input is off by one rounding (as in `flashtile.testing.accuracy`).
Peers other than flashtile may use twice as much: the gate asks whether they compute the same, not how they round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flashtile.cli.workload import Inputs, Workload
from flashtile.dropout import draw, keep_mask
from flashtile.testing.accuracy import PLAIN_FACTOR, STEPS, unit_roundoff

SAMPLED_ROWS = 128
PEER_SLACK = 2.0  # flashtile keeps its budget; others may round more, as PyTorch's CPU kernel does over grouped heads
SCORES_AT_ONCE = {"cpu": 2**21, "cuda": 2**24}  # elements of S held at once; float64 autograd keeps some six of them

Key = tuple[str, int]  # name of a result, and the batch element, -1 where the batch shares one


@dataclass(frozen=True)
class Value:
    """A part of a result: how to pick it from the whole tensor, and what it is; terms: what it is the sum of."""

    pick: Callable[[Tensor], Tensor]
    tensor: Tensor
    terms: Tensor | None = None


Values = dict[Key, Value]


@dataclass(frozen=True)
class Expected:
    """What one part of a result must be: pick takes that part of the peer's whole tensor `name`."""

    name: str
    pick: Callable[[Tensor], Tensor]
    exact: Tensor
    allowed: float


@dataclass(frozen=True)
class Part:
    """The query heads of one key-value head; `rows` of each batch element are computed, all where None."""

    work: Workload
    inputs: Inputs
    kv_head: int
    rows: Tensor | None

    @property
    def heads(self) -> slice:
        return slice(self.kv_head * self.work.group, (self.kv_head + 1) * self.work.group)

    def of_rows(self, tensor: Tensor, batch: int) -> Tensor:
        """[group, rows, dim] of a tensor with query heads."""
        whole = self._sequence(tensor, batch)[:, self.heads].transpose(0, 1)
        return whole if self.rows is None else whole[:, self.rows.to(whole.device)]

    def of_keys(self, tensor: Tensor, batch: int) -> Tensor:
        """[keys, dim] of a tensor with key-value heads."""
        return self._sequence(tensor, batch)[:, self.kv_head]

    def of_bias(self, tensor: Tensor) -> Tensor:
        """[group, q_len, k_len] of a bias that all batch elements share."""
        return tensor[0, self.heads]

    def _sequence(self, tensor: Tensor, batch: int) -> Tensor:
        if self.work.lengths is None:
            return tensor[batch]
        start = sum(self.work.lengths[:batch])
        return tensor[start : start + self.work.lengths[batch]]


def expectations(work: Workload, inputs: Inputs, backward: bool, drops: bool, seed: int = 0) -> list[Expected]:
    """What to check of a call; with `drops`, under the dropout mask of `random_state`."""
    generator = torch.Generator().manual_seed(seed)
    kv_head = int(torch.randint(work.kv_heads, (), generator=generator))
    rows = None if backward or work.lengths is not None else _sample_rows(work.q_len, generator)
    part = Part(work, inputs, kv_head, rows)
    # The gradient of what the batch shares is a sum over all of it; else three elements stand for the batch.
    shared = backward and (work.bias_grad or work.sinks)
    middle = int(torch.randint(work.batch, (), generator=generator))
    batches = list(range(work.batch)) if shared else sorted({0, middle, work.batch - 1})
    exact = _compute(part, batches, torch.float64, backward, drops)
    allowed = _allowances(part, exact, _compute(part, batches, inputs.q.dtype, backward, drops))
    shaken = _compute(replace(part, inputs=_shake(inputs)), batches, torch.float64, backward, drops)
    # In half precision the steps in between are finer than what is stored, P, dS and out; in float32 they are not.
    steps = STEPS if inputs.q.dtype in (torch.float32, torch.float64) else 1.0
    for key, value in shaken.items():
        allowed[key] += steps * _error(value.tensor, exact[key].tensor)
    # The largest error of all parts is compared with the largest allowance: one short sequence may be right by luck.
    pooled = {name: max(allowed[key] for key in allowed if key[0] == name) for name, _ in allowed}
    return [Expected(key[0], value.pick, value.tensor, pooled[key[0]]) for key, value in exact.items()]


def check(
    results: dict[str, Tensor], expected: list[Expected], slack: float = 1.0
) -> tuple[bool, dict[str, dict[str, float]]]:
    """(no error is above `slack` times its allowance, for each tensor the error and allowance of its worst part)."""
    worst: dict[str, dict[str, float]] = {}
    for entry in expected:
        error = _error(entry.pick(results[entry.name]), entry.exact)
        ratio = error / entry.allowed if entry.allowed > 0 else (0.0 if error == 0 else float("inf"))
        if entry.name not in worst or not ratio <= worst[entry.name]["ratio"]:
            worst[entry.name] = {"error": error, "allowed": entry.allowed, "ratio": ratio}
    return all(entry["ratio"] <= slack for entry in worst.values()), worst


def random_state(inputs: Inputs) -> Tensor:
    """The (seed, offset) that flashtile draws after torch.manual_seed(inputs.seed)."""
    torch.manual_seed(inputs.seed)
    return draw(inputs.q.device)


def _allowances(part: Part, exact: Values, standard: Values) -> dict[Key, float]:
    roundoff = unit_roundoff(part.inputs.q.dtype)
    allowed = {}
    for key, value in exact.items():
        error = _error(standard[key].tensor, value.tensor)
        if value.terms is not None:
            # One sum of many terms may be right by luck: its error counts as two standard deviations at least.
            error = max(error, 2 * _deviation(standard[key].terms, value.terms))
        largest = value.tensor.abs().max().item() if value.tensor.numel() else 0.0
        allowed[key] = PLAIN_FACTOR * error + roundoff * largest
    return allowed


def _deviation(terms: Tensor | None, exact: Tensor) -> float:
    """Standard deviation of a sum over the last axis whose terms err independently; the largest of several sums."""
    assert terms is not None
    return (terms.double() - exact).square().sum(-1).sqrt().max().item()


def _shake(inputs: Inputs) -> Inputs:
    """q, k, v and dout in float64, each element one rounding up or down."""
    generator = torch.Generator(inputs.q.device).manual_seed(inputs.seed)
    roundoff = unit_roundoff(inputs.q.dtype)

    def shaken(tensor: Tensor) -> Tensor:
        up = torch.randint(0, 2, tensor.shape, generator=generator, device=tensor.device, dtype=torch.float64)
        return tensor.double() * (1 + roundoff * (2 * up - 1))

    return inputs._replace(q=shaken(inputs.q), k=shaken(inputs.k), v=shaken(inputs.v), dout=shaken(inputs.dout))


def _error(value: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite where one of the two is not finite."""
    if value.numel() == 0:
        return 0.0
    error = (value.to(torch.float64) - exact).abs().max().item()
    return error if error == error else float("inf")


def _sample_rows(q_len: int, generator: torch.Generator) -> Tensor:
    """The first and the last row and others between."""
    if q_len <= SAMPLED_ROWS:
        return torch.arange(q_len)
    between = torch.randperm(q_len - 2, generator=generator)[: SAMPLED_ROWS - 2] + 1
    return torch.cat([torch.tensor([0, q_len - 1]), between]).sort().values


def _compute(part: Part, batches: list[int], dtype: torch.dtype, backward: bool, drops: bool) -> Values:
    """The part's results in a dtype, as standard attention over slabs of rows, with autograd's gradients.

    Gradients that sum over slabs are summed in float32 at least, as one matrix product would.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = part.inputs
    bias = None if inputs.bias is None else part.of_bias(inputs.bias).to(wide, copy=True)
    if bias is not None:
        bias.requires_grad_(backward)
    dsinks: list[Tensor] = []
    rng = random_state(inputs) if drops else None
    results: Values = {}
    for batch in batches:
        q, dout = part.of_rows(inputs.q, batch), part.of_rows(inputs.dout, batch)
        k, v = (_per_query_head(part, t, batch, wide).requires_grad_(backward) for t in (inputs.k, inputs.v))
        outs, dqs = [], []
        for slab in _slabs(part, batch, q.shape[1], k.shape[1]):
            leaf = q[:, slab.rows].to(wide, copy=True).requires_grad_(backward)
            sinks = None if inputs.sinks is None else inputs.sinks[part.heads, None].to(wide).repeat(1, leaf.shape[1])
            with torch.set_grad_enabled(backward):
                narrow = (None if t is None else t.to(dtype) for t in (bias, _leaf(sinks, backward)))
                out = slab.attend(leaf.to(dtype), k.to(dtype), v.to(dtype), *narrow, rng=rng)
            if backward:
                out.backward(dout[:, slab.rows].to(dtype))
                dqs.append(_grad(leaf))
                dsinks += [] if sinks is None else [_grad(sinks)]
            outs.append(out.detach())
        results["out", batch] = Value(partial(part.of_rows, batch=batch), torch.cat(outs, 1).to(dtype))
        if backward:
            results["dq", batch] = Value(partial(part.of_rows, batch=batch), torch.cat(dqs, 1).to(dtype))
            for name, repeated in (("dk", k), ("dv", v)):
                # Each query head's gradient is rounded before they are added, as where keys are repeated for each.
                grad = _grad(repeated).to(dtype).to(wide).sum(0).to(dtype)
                results[name, batch] = Value(partial(part.of_keys, batch=batch), grad)
    if backward and bias is not None and part.work.bias_grad:
        results["dbias", -1] = Value(part.of_bias, _grad(bias).to(dtype))
    if dsinks:
        terms = torch.cat(dsinks, 1)
        results["dsinks", -1] = Value(lambda tensor: tensor[part.heads], terms.sum(-1).to(dtype), terms)
    return results


def _per_query_head(part: Part, tensor: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """Keys or values of the part, repeated for its query heads, [group, keys, dim]."""
    return part.of_keys(tensor, batch).to(dtype).repeat(part.work.group, 1, 1)


def _leaf(tensor: Tensor | None, backward: bool) -> Tensor | None:
    return None if tensor is None else tensor.requires_grad_(backward)


def _grad(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _slabs(part: Part, batch: int, count: int, keys: int) -> list[Slab]:
    device = part.inputs.q.device
    lo, hi = (bound.to(device) for bound in part.work.intervals(batch))
    sampled = torch.arange(count, device=device) if part.rows is None else part.rows.to(device)
    step = max(16, SCORES_AT_ONCE.get(device.type, 2**21) // max(1, part.work.group * keys))
    return [
        Slab(part, batch, slice(start, start + step), sampled[start : start + step], lo, hi)
        for start in range(0, count, step)
    ]


@dataclass(frozen=True)
class Slab:
    """Some query rows of a part: `rows` are their places among the part's rows, `position` those in the sequence."""

    part: Part
    batch: int
    rows: slice
    position: Tensor
    lo: Tensor
    hi: Tensor

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sinks: Tensor | None, *, rng: Tensor | None
    ) -> Tensor:
        """Standard attention, [group, rows, v_dim], each step in the inputs' dtype; sinks: [group, rows]."""
        work, inputs = self.part.work, self.part.inputs
        scores = work.softmax_scale * (q @ k.transpose(-1, -2))  # [group, rows, keys]
        if work.softcap > 0:
            scores = work.softcap * torch.tanh(scores / work.softcap)
        key = torch.arange(k.shape[-2], device=k.device)
        if inputs.slopes is not None:
            q_len, k_len = work.shape_of(self.batch)
            distance = (self.position[:, None] + (k_len - q_len) - key).abs()
            scores = scores - (inputs.slopes[self.part.heads, None, None] * distance).to(scores.dtype)
        if bias is not None:
            scores = scores + bias[:, self.position]
        hidden = (key < self.lo[self.position, None]) | (key >= self.hi[self.position, None])
        # A row that sees nothing gets equal scores, so that no nan arises, and its weights are removed again.
        scores = scores.masked_fill(hidden, -torch.inf).masked_fill(hidden.all(-1, keepdim=True), 0.0)
        if sinks is not None:
            scores = torch.cat([scores, sinks[..., None]], -1)
        weights = torch.softmax(scores, -1)[..., : k.shape[-2]].masked_fill(hidden, 0.0)
        if rng is not None:
            head = torch.arange(work.heads, device=k.device)[self.part.heads] + self.batch * work.heads
            kept = keep_mask(rng, work.dropout_p, head[:, None, None], self.position[:, None], key)
            weights = weights * kept / (1 - work.dropout_p)
        return weights @ v
