"""Standard attention of one head, with its traffic: the algorithm that FlashAttention is measured against.

Dao et al. 2022, "FlashAttention", algorithm 0 (forward) and algorithm 3 (backward). Q is N x d, K M x d, V M x d_v:

    1. load Q, K         compute S = tau Q K^T, masked           write S
    2. load S            compute P = softmax(S)                  write P
    3. load P, V         compute O = P V                         write O

S and P are N x M: all but N (d + d_v) + M (d + d_v) of the elements that cross slow memory belong to them. Every matrix
is counted once per step, as if fast memory were large enough for each product: a lower bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.masks import Mask
from flashtile.reference.softmax import safe_softmax
from flashtile.reference.tiles import Head
from flashtile.reference.traffic import Traffic


def forward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    *,
    scale: float | None = None,
    mask: Mask | None = None,
    traffic: Traffic | None = None,
) -> tuple[Tensor, Tensor]:
    """(O, P): the output (N, d_v) and the weights (N, M), which the backward reads again."""
    memory = Traffic() if traffic is None else traffic
    head = Head(Q, K, scale, mask)
    S, P = Q.new_empty(len(Q), len(K)), Q.new_empty(len(Q), len(K))
    O = Q.new_empty(len(Q), V.shape[1])
    memory.store(S, head.scores(memory.load(Q), memory.load(K), 0, 0))
    memory.store(P, safe_softmax(memory.load(S)) if len(K) else P)
    memory.store(O, memory.load(P) @ memory.load(V))
    return O, P


def backward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    P: Tensor,
    dO: Tensor,
    *,
    scale: float | None = None,
    traffic: Traffic | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) from the weights P that the forward has kept."""
    memory = Traffic() if traffic is None else traffic
    tau = Head(Q, K, scale, None).tau
    dP, dS = torch.empty_like(P), torch.empty_like(P)
    dQ, dK, dV = torch.empty_like(Q), torch.empty_like(K), torch.empty_like(V)
    memory.store(dV, memory.load(P).T @ memory.load(dO))
    memory.store(dP, memory.load(dO) @ memory.load(V).T)
    memory.store(dS, _softmax_gradient(memory.load(P), memory.load(dP)))
    memory.store(dQ, tau * memory.load(dS) @ memory.load(K))
    memory.store(dK, tau * memory.load(dS).T @ memory.load(Q))
    return dQ, dK, dV


def _softmax_gradient(P: Tensor, dP: Tensor) -> Tensor:
    """dS = P * (dP - rowsum(P * dP))."""
    return P * (dP - (P * dP).sum(-1, keepdim=True))
