"""Pair order: the (token, slot) pairs of each linear by expert, and where each expert's begin.

A stable counting sort: experts rising, and within an expert tokens, then slots rising. Empty slots stand nowhere.

Shapes: T tokens, N linears, K slots, E experts, P = T * K pairs of a linear.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pair_order_reference(ids_TNK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Pairs by expert, one after the other.

    Args:
        ids_TNK: Expert of every slot, -1 where empty.
        experts: E.

    Returns:
        order_NP: Numbers t * K + k, int32; those beyond the last expert's pairs mean nothing.
        start_NE: Place of each expert's first pair, [N, E + 1], int32; the last is the number of pairs in use.
    """
    tokens, linears, slots = ids_TNK.shape
    order_NP = torch.zeros(linears, tokens * slots, dtype=torch.int32)
    start_NE = torch.zeros(linears, experts + 1, dtype=torch.int32)
    for n in range(linears):
        ids_P = ids_TNK[:, n].flatten()
        place = 0
        for e in range(experts):
            start_NE[n, e] = place
            for pair in (ids_P == e).nonzero()[:, 0].tolist():
                order_NP[n, place] = pair
                place += 1
        start_NE[n, experts] = place
    return order_NP, start_NE
