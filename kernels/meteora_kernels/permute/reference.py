"""Permute and unpermute: token rows into the order in which an exchange sends them, and sums of them back.

    permute     row_S[position_DT[d, t]] = x_T[t], with the ids and weights that count at rank d
    unpermute   out_T[t] = sum over d, rising, of row_S[position_DT[d, t]]

A rank that wants nothing of a token has no row for it where its position is -1, and a row of zeros without experts
where it has one: exchanges of equal size send a row for every token.

Shapes: D ranks, T tokens, N linears, K slots, H width, S rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

NOWHERE = -1


def permute_reference(
    x_TH: Tensor, local_DTNK: Tensor, weights_TNK: Tensor, position_DT: Tensor, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows to send, one after the other.

    Args:
        x_TH: Token rows.
        local_DTNK: The id of every slot at each rank that shall compute it, -1 elsewhere.
        weights_TNK: Their weights, fp32.
        position_DT: Row of each token for each rank, ``NOWHERE`` for none; those past the T tokens are padding.
        rows: S; every row is some token's.

    Returns:
        rows_SH, ids_SNK (int32) and weights_SNK (fp32, 0 where the id is -1).
    """
    rows_SH = x_TH.new_zeros(rows, x_TH.shape[1])
    ids_SNK = torch.full((rows, *local_DTNK.shape[2:]), NOWHERE, dtype=torch.int32)
    weights_SNK = torch.zeros(ids_SNK.shape)
    for d, positions in enumerate(position_DT.tolist()):
        for t, s in enumerate(positions):
            if s == NOWHERE or t >= x_TH.shape[0] or bool((local_DTNK[d, t] < 0).all()):
                continue
            rows_SH[s] = x_TH[t]
            ids_SNK[s] = local_DTNK[d, t].int()
            weights_SNK[s] = torch.where(local_DTNK[d, t] >= 0, weights_TNK[t], 0.0)
    return rows_SH, ids_SNK, weights_SNK


def unpermute_reference(rows_SO: Tensor, position_DT: Tensor, tokens: int) -> Tensor:
    """The sums [T, O], fp32.

    Args:
        rows_SO: What came back, in the order in which rows were sent.
        position_DT: As in ``permute_reference``.
        tokens: T.
    """
    sums_TO = torch.zeros(tokens, rows_SO.shape[1], device=rows_SO.device)
    for positions in position_DT.tolist():
        for t, s in enumerate(positions[:tokens]):
            if s != NOWHERE:
                sums_TO[t] += rows_SO[s].float()
    return sums_TO
