"""FlashAttention-2 of one head, forward: Dao 2023, algorithm 1 and section 3.1 (arXiv 2307.08691).

    for i in 1..T_r:                                        Q in the outer loop
        load Q_i;  O_i = 0, l_i = 0, m_i = -inf in fast memory
        for j in the key tiles that rows of i see:          fully masked tiles are never loaded
            load K_j, V_j
            S_ij = MASK(tau Q_i K_j^T)
            m' = max(m_i, rowmax(S_ij)),  P~ = exp(S_ij - m')
            l_i = exp(m_i - m') l_i + rowsum(P~)
            O_i = diag(exp(m_i - m')) O_i + DROPOUT(P~) V_j  not divided
            m_i = m'
        write O_i = diag(l_i)^-1 O_i,  L_i = m_i + log(l_i)  one division at the end

Against FlashAttention-1: O, l and m stay in fast memory, one statistic L is kept instead of two, the division moves out
of the loop, and each query tile is independent of the others, so they run in parallel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.masks import Mask
from flashtile.reference.softmax import Part, finish, finite
from flashtile.reference.tiles import Head, dropped, slices
from flashtile.reference.traffic import Shape, Traffic, key_tiles_seen


def forward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    mask: Mask | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    traffic: Traffic | None = None,
) -> tuple[Tensor, Tensor]:
    """(O, L): the output (N, d_v) and the logarithm of each row's softmax denominator, (N,), -inf for an empty row.

    block_q, block_k: B_r and B_c. dropout_p, rng: as `dropout.keep_mask` with batch * heads + head = 0.
    """
    memory = Traffic() if traffic is None else traffic
    head = Head(Q, K, scale, mask)
    O, L = Q.new_empty(len(Q), V.shape[1]), Q.new_empty(len(Q))
    key_slices = slices(len(K), block_k)
    seen = key_tiles_seen(Shape(len(Q), len(K), Q.shape[1], V.shape[1], block_q, block_k, mask))
    for rows, tiles in zip(slices(len(Q), block_q), seen, strict=True):
        Q_i = memory.load(Q[rows])
        l_i, O_i = Q_i.new_zeros(len(Q_i), 1), Q_i.new_zeros(len(Q_i), V.shape[1])
        m_i = torch.full_like(l_i, -torch.inf)
        for j in tiles:
            keys = key_slices[j]
            K_j, V_j = memory.load(K[keys]), memory.load(V[keys])
            S_ij = head.scores(Q_i, K_j, rows.start, keys.start)
            m_new = torch.maximum(m_i, S_ij.amax(-1, keepdim=True))
            P_tile = torch.exp(S_ij - finite(m_new))
            shrink = torch.exp(m_i - finite(m_new))
            l_i = shrink * l_i + P_tile.sum(-1, keepdim=True)
            O_i = shrink * O_i + dropped(P_tile, dropout_p, rng, rows, keys) @ V_j
            m_i = m_new
        O_done, L_done = finish(Part(m_i, l_i, O_i))
        memory.store(O[rows], O_done)
        memory.store(L[rows], L_done)
    return O, L
