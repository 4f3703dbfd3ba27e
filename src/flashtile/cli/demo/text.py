"""The text that the demo's GPT learns: Python's own standard library as it lies on the machine, or a file."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashtile.cli.console import UsageError

HELD_OUT = 10  # one file, or one part of the text, in this many is kept from training
MOST_BYTES = 16 * 2**20
_OTHERS_CODE = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """Bytes as uint8 tensors. source: where they come from, in words. files: how many."""

    training: Tensor
    held_out: Tensor
    source: str
    files: int


def read(path: str | None, shortest: int) -> Text:
    """The text of `path`, its last tenth held out, or the standard library's sources, every tenth file held out.

    Raises UsageError where the file cannot be read or a part has fewer than `shortest` bytes.
    """
    text = _standard_library() if path is None else _file(Path(path))
    for part, have in (("training text", text.training.numel()), ("held-out text", text.held_out.numel())):
        if have < shortest:
            raise UsageError(f"--text: got {have} bytes of {part}, expected at least {shortest}")
    return text


def _file(path: Path) -> Text:
    try:
        content = path.read_bytes()[:MOST_BYTES]
    except OSError as error:
        raise UsageError(f"--text: got {path}, expected a readable file ({error.strerror})") from None
    border = len(content) - len(content) // HELD_OUT
    return Text(_as_tensor(content[:border]), _as_tensor(content[border:]), path.name, 1)


def _standard_library() -> Text:
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in folder.rglob("*.py") if not _OTHERS_CODE & set(p.relative_to(folder).parts))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, file in enumerate(files):
        parts[index % HELD_OUT == 0].append(file.read_bytes())
    training, held_out = (b"".join(part)[:MOST_BYTES] for part in parts)
    version = sysconfig.get_python_version()
    return Text(_as_tensor(training), _as_tensor(held_out), f"Python {version}'s standard library", len(files))


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)


def byte_entropy(text: Tensor) -> float:
    """Nats a byte for who only knows how often each byte occurs in this very text: what a model must beat."""
    share = torch.bincount(text.long(), minlength=256).double() / text.numel()
    return -(share * share.clamp(min=1e-300).log()).sum().item()
