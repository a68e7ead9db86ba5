"""Routed LoRA, dense regime, between and after its products: what is left of every shrunk column, and the expand.

    z_TC = (x A^T)_TC * s_C * sum_k w_TK [e_TK is the expert of column c]
    delta_n = z_TC[columns of n] B_n

Shapes: T tokens, N linears, K slots, E experts, C columns of all linears (experts times rank), O_n output widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meteora_kernels.routed_lora.stack import LoraStack


def scale_reference(shrunk_TC: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> Tensor:
    """z_TC, fp32.

    Args:
        shrunk_TC: x times all A, fp32.
        stack: A packed stack.
        ids_TNK: Expert of every slot, -1 where empty.
        weights_TNK: Weight of every slot, fp32.
    """
    assert stack.packed is not None, "the dense regime reads packed matrices"
    scaled_TC = torch.zeros_like(shrunk_TC)
    for c, pair in enumerate(stack.packed.pair_of_C.tolist()):
        n, e = divmod(pair, stack.num_experts)
        weight_T = torch.where(ids_TNK[:, n] == e, weights_TNK[:, n], 0.0).sum(-1)
        scaled_TC[:, c] = shrunk_TC[:, c] * (weight_T * stack.scales_NE[n, e])
    return scaled_TC


def expand_dense_reference(scaled_TC: Tensor, stack: LoraStack) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], fp32."""
    assert stack.packed is not None, "the dense regime reads packed matrices"
    parts = scaled_TC.float().split([b_CO.shape[0] for b_CO in stack.packed.b_CO], dim=1)
    return tuple(part_TC @ b_CO.float() for part_TC, b_CO in zip(parts, stack.packed.b_CO, strict=True))
