"""FlashAttention-1 of one head, as published: Dao et al. 2022, algorithms 1, 2 and 4 (arXiv 2205.14135).

Q is N x d, K and V are M x d, cut in T_r tiles of B_r rows and T_c tiles of B_c rows. Forward (algorithm 2):

    O = 0, l = 0, m = -inf in slow memory
    for j in 1..T_c:                                        K/V in the outer loop
        load K_j, V_j
        for i in 1..T_r:
            load Q_i, O_i, l_i, m_i
            S_ij = MASK(tau Q_i K_j^T)
            m~ = rowmax(S_ij), P~ = exp(S_ij - m~), l~ = rowsum(P~)
            m' = max(m_i, m~), l' = exp(m_i - m') l_i + exp(m~ - m') l~
            P~ = DROPOUT(P~)
            write O_i = diag(l')^-1 (diag(l_i) exp(m_i - m') O_i + exp(m~ - m') P~ V_j)
            write l_i = l', m_i = m'

O is divided by l at every step, and O, l and m cross slow memory T_c times: that is what FlashAttention-2 saves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.masks import Mask
from flashtile.reference.softmax import finite, nonzero, statistics
from flashtile.reference.tiles import Head, dropped, slices
from flashtile.reference.traffic import Traffic


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(O, l, m): the output (N, d_v) and each row's softmax denominator and maximum, (N,).

    block_q, block_k: B_r and B_c; `traffic.fa1_block_sizes(M, d)` gives those of the paper for a fast memory of M
    elements. dropout_p, rng: as `dropout.keep_mask` with batch * heads + head = 0.
    """
    memory = Traffic() if traffic is None else traffic
    head = Head(Q, K, scale, mask)
    O, l, m = Q.new_empty(len(Q), V.shape[1]), Q.new_empty(len(Q), 1), Q.new_empty(len(Q), 1)
    memory.store(O, 0.0)
    memory.store(l, 0.0)
    memory.store(m, -torch.inf)
    for keys in slices(len(K), block_k):
        K_j, V_j = memory.load(K[keys]), memory.load(V[keys])
        for rows in slices(len(Q), block_q):
            Q_i, O_i, l_i, m_i = (memory.load(t[rows]) for t in (Q, O, l, m))
            S_ij = head.scores(Q_i, K_j, rows.start, keys.start)
            m_tile, P_tile, l_tile = statistics(S_ij)
            m_new = torch.maximum(m_i, m_tile)
            shrink, shrink_tile = torch.exp(m_i - finite(m_new)), torch.exp(m_tile - finite(m_new))
            l_new = shrink * l_i + shrink_tile * l_tile
            P_tile = dropped(P_tile, dropout_p, rng, rows, keys)
            memory.store(O[rows], (l_i * shrink * O_i + shrink_tile * (P_tile @ V_j)) / nonzero(l_new))
            memory.store(l[rows], l_new)
            memory.store(m[rows], m_new)
    return O, l.squeeze(-1), m.squeeze(-1)


def backward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    O: Tensor,
    l: Tensor,
    m: Tensor,
    dO: Tensor,
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    mask: Mask | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    traffic: Traffic | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) by recomputation (algorithm 4): P_ij = diag(l_i)^-1 exp(S_ij - m_i), never kept.

    D_i = rowsum(dO_i * O_i) is computed again in every tile, so O_i is loaded T_c times.
    """
    memory = Traffic() if traffic is None else traffic
    head = Head(Q, K, scale, mask)
    dQ, dK, dV = torch.empty_like(Q), torch.empty_like(K), torch.empty_like(V)
    memory.store(dQ, 0.0)
    for keys in slices(len(K), block_k):
        K_j, V_j = memory.load(K[keys]), memory.load(V[keys])
        dK_j, dV_j = torch.zeros_like(K_j), torch.zeros_like(V_j)
        for rows in slices(len(Q), block_q):
            Q_i, O_i, dO_i, dQ_i, l_i, m_i = (memory.load(t[rows]) for t in (Q, O, dO, dQ, l[:, None], m[:, None]))
            S_ij = head.scores(Q_i, K_j, rows.start, keys.start)
            P_ij = torch.exp(S_ij - finite(m_i)) / nonzero(l_i)
            dV_j += dropped(P_ij, dropout_p, rng, rows, keys).T @ dO_i
            dP_ij = dropped(dO_i @ V_j.T, dropout_p, rng, rows, keys)
            D_i = (dO_i * O_i).sum(-1, keepdim=True)
            dS_ij = P_ij * (dP_ij - D_i)
            memory.store(dQ[rows], dQ_i + head.tau * dS_ij @ K_j)
            dK_j += head.tau * dS_ij.T @ Q_i
        memory.store(dK[keys], dK_j)
        memory.store(dV[keys], dV_j)
    return dQ, dK, dV
