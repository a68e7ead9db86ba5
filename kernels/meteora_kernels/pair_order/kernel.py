"""Pair order on a GPU: one launch, no atomics, nothing read on the host. Definition and twin: ``reference.py``.

Every program sorts the pairs of a block of experts. It counts them, and all pairs of smaller experts, in a first pass
over the ids, and places them in a second; ids are few, so reading them twice costs less than another launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.launch import EXACT

EXPERTS_OF_A_PROGRAM = 16
PAIRS_AT_ONCE = 256


@triton.jit(do_not_specialize=["P"])
def pair_order_kernel(ids_TNK, order_NP, start_NE, P, E, N, K: tl.constexpr, BP: tl.constexpr, BE: tl.constexpr):
    """Grid (N, blocks of experts)."""
    n = tl.program_id(0)
    e = tl.program_id(1) * BE + tl.arange(0, BE)
    before = 0
    counts = tl.zeros([BE], tl.int32)
    for first in range(0, P, BP):
        pair = first + tl.arange(0, BP)
        place = (pair // K).to(tl.int64) * N * K + n * K + pair % K
        ids = tl.load(ids_TNK + place, mask=pair < P, other=-1).to(tl.int32)
        before += tl.sum(((ids >= 0) & (ids < tl.program_id(1) * BE)).to(tl.int32), axis=0)
        counts += tl.sum((ids[:, None] == e[None, :]).to(tl.int32), axis=0)
    # The experts before this block have all the smaller ids.
    begin = before + tl.cumsum(counts, axis=0) - counts
    tl.store(start_NE + n * (E + 1) + e, begin, mask=e < E)
    tl.store(start_NE + n * (E + 1) + e + 1, begin + counts, mask=e == E - 1)
    for first in range(0, P, BP):
        pair = first + tl.arange(0, BP)
        place = (pair // K).to(tl.int64) * N * K + n * K + pair % K
        ids = tl.load(ids_TNK + place, mask=pair < P, other=-1).to(tl.int32)
        mine = (ids[:, None] == e[None, :]) & (e < E)[None, :]
        hits = mine.to(tl.int32)
        rank = tl.cumsum(hits, axis=0) - hits + begin[None, :]
        target = tl.sum(tl.where(mine, rank, 0), axis=1)
        tl.store(order_NP + n * P + target, pair, mask=tl.sum(hits, axis=1) > 0)
        begin += tl.sum(hits, axis=0)


def pair_order(ids_TNK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """As ``pair_order_reference``."""
    tokens, linears, slots = ids_TNK.shape
    order_NP = torch.empty(linears, tokens * slots, dtype=torch.int32, device=ids_TNK.device)
    start_NE = torch.empty(linears, experts + 1, dtype=torch.int32, device=ids_TNK.device)
    if not experts:
        return order_NP, start_NE.zero_()
    block = min(triton.next_power_of_2(experts), EXPERTS_OF_A_PROGRAM)
    pair_order_kernel[linears, triton.cdiv(experts, block)](
        ids_TNK.contiguous(), order_NP, start_NE, tokens * slots, experts, linears, K=slots, BP=PAIRS_AT_ONCE,
        BE=block, **EXACT,
    )  # fmt: skip
    return order_NP, start_NE
