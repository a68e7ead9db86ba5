"""Which regime serves a stack: a pure function of its size."""

from __future__ import annotations

from torch import Tensor

from meteora_kernels.routed_lora.dense import pack, routed_lora_dense
from meteora_kernels.routed_lora.grouped import routed_lora_grouped
from meteora_kernels.routed_lora.stack import LoraStack, with_room

DENSE_COLUMNS = 512
"""Columns (experts times rank) a linear may have to be served densely; chosen by arithmetic, not yet measured."""


def arrange(stack: LoraStack) -> LoraStack:
    """The stack as its regime wants it: packed when it is small and made of whole pairs, as it is otherwise.

    Either way there is room for the matrices that are not here yet.
    """
    small = max(stack.columns, default=0) <= DENSE_COLUMNS
    # Without any expert there is nothing to pack; a group may hold none.
    return pack(stack) if small and stack.experts and stack.whole else with_room(stack)


def routed_lora(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], in x's dtype. Arguments as in the reference; whole pairs only."""
    operator = routed_lora_grouped if stack.packed is None else routed_lora_dense
    return operator(x_TH, stack, ids_TNK, weights_TNK)
