"""Runs the few PTX instructions of the Hopper backend's inline code for one warp, a NumPy row of 32 lanes a register.

The GPU is not needed to see whether that code computes what it should; how fast it does is another matter.
"""

from __future__ import annotations

import re
import struct

import numpy as np

LANES = 32


def run(code: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The `outputs` registers $0, $1, ... after `code`, whose other operands are `inputs`, each [32]."""
    lines = [line for line in re.findall(r"[^;\n{}]+:|[^;\n{}]+(?=;)", code) if not line.strip().startswith(".reg")]
    lines = [line.strip() for line in lines]
    labels = {line[:-1]: at for at, line in enumerate(lines) if line.endswith(":")}
    registers = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    at = 0
    with np.errstate(all="ignore"):
        while at < len(lines):
            jump = _step(lines[at], registers)
            at = at + 1 if jump is None else labels[jump]
    return [registers[f"${i}"] for i in range(outputs)]


def _step(line: str, registers: dict[str, np.ndarray]) -> str | None:
    """Executes a line; the label to go on at, if it is a branch that is taken."""
    if line.endswith(":"):
        return None
    parts = re.fullmatch(r"(?:@!(\w+) )?([\w.]+) (.*)", line)
    assert parts is not None, line
    guard, operation, operands = parts.groups()
    if operation == "bra.uni":
        taken = ~registers[guard]
        assert taken.all() or not taken.any(), "a branch that not all lanes take is not uniform"
        return operands if taken[0] else None
    target, *names = [name.strip() for name in operands.split(",")]
    registers[target] = _value(operation, [_operand(name, registers) for name in names])
    return None


def _operand(name: str, registers: dict[str, np.ndarray]) -> np.ndarray:
    if name.startswith("0f"):
        return np.full(LANES, struct.unpack(">f", bytes.fromhex(name[2:]))[0], np.float32)
    if name.startswith("0x") or name.isdigit():
        return np.full(LANES, int(name, 0))
    return registers[name]


def _value(operation: str, x: list[np.ndarray]) -> np.ndarray:
    match operation:
        case "mov.f32":
            return x[0].copy()
        case "mov.b32":
            return x[0].view(np.uint32)
        case "shr.u32":
            return x[0] >> np.uint32(x[1][0])
        case "sub.u32":
            return (x[0] - x[1]).astype(np.uint32)
        case "max.u32":
            return np.maximum(x[0], x[1]).astype(np.uint32)
        case "min.u32":
            return np.minimum(x[0], x[1]).astype(np.uint32)
        case "cvt.rn.f32.u32":
            return x[0].astype(np.float32)
        case "neg.f32":
            return -x[0]
        case "add.f32":
            return x[0] + x[1]
        case "sub.f32":
            return x[0] - x[1]
        case "mul.f32":
            return x[0] * x[1]
        case "fma.rn.f32":
            return (x[0].astype(np.float64) * x[1] + x[2]).astype(np.float32)
        case "max.f32":
            return np.fmax(x[0], x[1])
        case "ex2.approx.ftz.f32":
            return np.exp2(x[0]).astype(np.float32)
        case "setp.eq.f32":
            return x[0] == x[1]
        case "setp.ne.u32":
            return x[0] != x[1]
        case "setp.le.or.f32":
            return (x[0] <= x[1]) | x[2]
        case "setp.neu.f32":
            return ~(x[0] == x[1])
        case "setp.neu.or.f32":
            return ~(x[0] == x[1]) | x[2]
        case "setp.gt.f32":
            return x[0] > x[1]
        case "setp.gt.or.f32":
            return (x[0] > x[1]) | x[2]
        case "setp.gtu.f32":
            return ~(x[0] <= x[1])
        case "setp.gtu.or.f32":
            return ~(x[0] <= x[1]) | x[2]
        case "selp.f32":
            return np.where(x[2], x[0], x[1])
        case "vote.sync.any.pred":
            return np.full(LANES, x[0].any())
        case "shfl.sync.bfly.b32":
            return x[0][np.arange(LANES) ^ x[1][0]]
    raise NotImplementedError(operation)
