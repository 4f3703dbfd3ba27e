"""FlashAttention-2 of one head, backward with recomputation: Dao 2023, algorithm 2 (arXiv 2307.08691).

    D = rowsum(dO * O) - dL, written to slow memory once;  dQ = 0 in slow memory
    for j in 1..T_c:
        load K_j, V_j;  dK_j = 0, dV_j = 0 in fast memory
        for i in the query tiles with a row that sees a key of j:
            load Q_i, dO_i, dQ_i, L_i, D_i
            P_ij = exp(MASK(tau Q_i K_j^T) - L_i)            S and P are computed again, from L alone
            dV_j += DROPOUT(P_ij)^T dO_i
            dP_ij = DROPOUT(dO_i V_j^T)
            dS_ij = P_ij * (dP_ij - D_i)
            write dQ_i += tau dS_ij K_j
            dK_j += tau dS_ij^T Q_i
        write dK_j, dV_j

dL is the gradient of L, where L is used further (the published algorithm has none, dL = 0).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashtile.masks import Mask
from flashtile.reference.tiles import Head, dropped, slices
from flashtile.reference.traffic import Shape, Traffic, query_tiles_seeing


def backward(
    Q: Tensor,
    K: Tensor,
    V: Tensor,
    O: Tensor,
    L: Tensor,
    dO: Tensor,
    dL: Tensor | None = None,
    *,
    block_q: int,
    block_k: int,
    scale: float | None = None,
    mask: Mask | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    traffic: Traffic | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dQ, dK, dV) from what `flash2.forward` gave: O (N, d_v) and L (N,)."""
    memory = Traffic() if traffic is None else traffic
    head = Head(Q, K, scale, mask)
    D, dQ, dK, dV = torch.empty_like(L), torch.empty_like(Q), torch.empty_like(K), torch.empty_like(V)
    products = (memory.load(dO) * memory.load(O)).sum(-1)
    memory.store(D, products if dL is None else products - memory.load(dL))
    memory.store(dQ, 0.0)
    query_slices = slices(len(Q), block_q)
    seeing = query_tiles_seeing(Shape(len(Q), len(K), Q.shape[1], V.shape[1], block_q, block_k, mask))
    for keys, tiles in zip(slices(len(K), block_k), seeing, strict=True):
        K_j, V_j = memory.load(K[keys]), memory.load(V[keys])
        dK_j, dV_j = torch.zeros_like(K_j), torch.zeros_like(V_j)
        for i in tiles:
            rows = query_slices[i]
            Q_i, dO_i, dQ_i, L_i, D_i = (memory.load(t[rows]) for t in (Q, dO, dQ, L[:, None], D[:, None]))
            S_ij = head.scores(Q_i, K_j, rows.start, keys.start)
            # A row that sees nothing has L = -inf; +inf in its place makes all of its weights 0.
            P_ij = torch.exp(S_ij - torch.where(L_i == -torch.inf, torch.inf, L_i))
            dV_j += dropped(P_ij, dropout_p, rng, rows, keys).T @ dO_i
            dP_ij = dropped(dO_i @ V_j.T, dropout_p, rng, rows, keys)
            dS_ij = P_ij * (dP_ij - D_i)
            memory.store(dQ[rows], dQ_i + head.tau * dS_ij @ K_j)
            dK_j += head.tau * dS_ij.T @ Q_i
        memory.store(dK[keys], dK_j)
        memory.store(dV[keys], dV_j)
    return dQ, dK, dV
