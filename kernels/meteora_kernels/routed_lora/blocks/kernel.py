"""What the grouped kernels share: blocks of tokens that meet their experts one after the other.

A program takes 1 or 16 neighbouring tokens and meets their experts in rising order, each once. Its tiles have 16 rows
in any case, and a row's sums run over features alone, in one order: what else is in the block changes nothing.

Shapes: T tokens, N linears, K slots, E experts, R largest rank, L planes. KP, BR, BH and BO are blocks of K, of a rank
and of widths, as powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from meteora_kernels.routed_lora.tables import Matrices

TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
MOST_RANKS_AT_ONCE = 64
TILE_ROWS = tl.constexpr(16)
NOBODY = tl.constexpr(2**31 - 1)


@triton.jit
def block_of_pairs(ids_TNK, t, n, live, N, K: tl.constexpr, KP: tl.constexpr):
    """Places [16, KP] of the slots of 16 tokens at linear n, and their experts, -1 where there is none."""
    k = tl.arange(0, KP)
    place = (t.to(tl.int64)[:, None] * N + n) * K + k[None, :]
    held = live[:, None] & (k < K)[None, :]
    return place, tl.load(ids_TNK + place, mask=held, other=-1).to(tl.int32)


@triton.jit
def expert_after(ids, last):
    """The smallest expert above ``last`` in a block."""
    return tl.min(tl.min(tl.where(ids > last, ids, NOBODY), axis=1), axis=0)


def rank_block(matrices: Matrices) -> int:
    """BR: ranks a program holds at once."""
    rows: int = triton.next_power_of_2(max(16, matrices.most_rows))
    return min(rows, MOST_RANKS_AT_ONCE)


def matrix_args(matrices: Matrices) -> tuple[Tensor, ...]:
    """Its tables, in the order kernels take them."""
    return matrices.address_NE, matrices.rows_NE, matrices.first_NE, matrices.width_N, matrices.start_N
