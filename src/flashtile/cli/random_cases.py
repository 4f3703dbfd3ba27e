"""Random calls for `verify`: any shape, any mask, any features together."""

from __future__ import annotations

import random

from flashtile import masks
from flashtile.testing import Case

LENGTHS = (1, 2, 15, 16, 17, 31, 63, 64, 65, 100, 111, 128)
DIMS = (1, 3, 8, 16, 24, 32, 40, 59, 64, 96, 128)
MOST_SEQUENCES = 4
LAYOUTS = ("bhnd", "expanded", "strided")  # "packed" asks for equal shapes of q, k and v


def random_case(generator: random.Random, index: int) -> Case:
    """A case drawn by the generator; the same generator state gives the same case."""
    chance, pick = generator.random, generator.choice
    kv_heads = pick((1, 2))
    packed = chance() < 0.3
    sequences = generator.randint(1, MOST_SEQUENCES)
    q_lens = tuple(pick((0, *LENGTHS)) for _ in range(sequences)) if packed else None
    k_lens = tuple(pick((0, *LENGTHS)) for _ in range(sequences)) if packed else None
    bias = pick(("additive", "additive-inf", "boolean")) if chance() < 0.3 else None
    axes = "".join(axis if chance() < 0.6 else "1" for axis in "bhqk")
    qk_dim = pick(DIMS)
    return Case(
        id=f"random-{index}",
        why="drawn at random",
        batch=pick((1, 2, 3)),
        q_len=pick(LENGTHS),
        k_len=pick(LENGTHS),
        heads=kv_heads * pick((1, 1, 2, 3)),
        kv_heads=kv_heads,
        dim=qk_dim,
        v_dim=pick((None, None, pick(DIMS))),
        mask=_mask(generator) if chance() < 0.7 else None,
        scale=pick((None, None, 1.0, -0.2)),
        softcap=pick((0.0, 0.0, 5.0, 30.0)),
        alibi=pick((None, None, "heads", "batch")),
        bias=bias,
        bias_axes=axes,
        sinks=chance() < 0.25,
        dropout_p=pick((0.0, 0.0, 0.0, 0.1, 0.5)),
        q_lens=q_lens,
        k_lens=k_lens,
        trailing=pick((0, 3)) if packed else 0,
        layout=pick(LAYOUTS) if not packed and chance() < 0.3 else "contiguous",
        dlse=chance() < 0.5,
        deterministic=chance() < 0.1,
    )


def _mask(generator: random.Random) -> masks.Mask:
    far = generator.randint
    kinds: tuple[masks.Mask, ...] = (
        masks.Causal(),
        masks.Window(far(0, 70), far(0, 70)),
        masks.Window(far(0, 40), 0),
        masks.Window(None, far(-5, 40)),
        masks.Prefix(far(1, 80)),
        masks.Chunked(far(1, 40), far(0, 20)),
    )
    mask = generator.choice(kinds)
    return mask & masks.Causal() if generator.random() < 0.3 else mask
