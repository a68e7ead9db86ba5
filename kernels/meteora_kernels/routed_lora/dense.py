"""Routed LoRA, dense regime: every token meets every expert's A, and the weights pick what counts.

One product for all shrinks, one mask-and-scale, one product a linear for the expands: no sort, no gather, static
shapes. It reads the whole stack, so it is for few experts (see ``plan``). Formula and twin: ``reference.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from meteora_kernels.routed_lora.stack import LoraStack


def routed_lora_dense(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], in x's dtype. Arguments as in the reference."""
    pairs = stack.scales_NE.numel()
    firsts_N1 = torch.arange(0, pairs, stack.num_experts, device=x_TH.device)[:, None]
    slots_TS = (ids_TNK.clamp_min(0) + firsts_N1).flatten(1)
    # An empty slot points at expert 0 with weight 0 and adds nothing.
    weights_TP = weights_TNK.new_zeros(x_TH.shape[0], pairs).scatter_add_(1, slots_TS, weights_TNK.flatten(1))
    scales_TC = (weights_TP * stack.scales_NE.flatten()).index_select(1, stack.pair_of_C)
    shrunk_TC = linear(x_TH, stack.a_CH) * scales_TC.to(x_TH.dtype)
    parts = shrunk_TC.split(stack.columns, dim=1)
    return tuple(part_TC @ b_CO for part_TC, b_CO in zip(parts, stack.b_CO, strict=True))
