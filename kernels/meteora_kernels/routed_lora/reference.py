"""Routed LoRA: what the routed experts add to N linears that share one input.

    delta_n[t] = sum_k w[t,n,k] * s[n,e] * (x[t] A[n,e]^T) B[n,e]^T,   e = ids[t,n,k]

This is the readable twin, one expert at a time in fp32. MeteoRA, arXiv 2405.13053.

Shapes: T tokens, H input width, O_n output width, N linears, K slots. An id of -1 is an empty slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from meteora_kernels.routed_lora.stack import LoraStack


def routed_lora_reference(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], fp32.

    Args:
        x_TH: The linears' shared input.
        stack: Their experts.
        ids_TNK: Expert of every slot, int64, -1 where empty.
        weights_TNK: Weight of every slot, fp32.
    """
    deltas = []
    for n in range(stack.num_linears):
        delta_TO = x_TH.new_zeros(x_TH.shape[0], stack.b_CO[n].shape[1], dtype=torch.float32)
        for e in range(stack.num_experts):
            a_RH, b_RO = stack.pair(n, e)
            weight_T = torch.where(ids_TNK[:, n] == e, weights_TNK[:, n], 0.0).sum(-1)
            lora_TO = (x_TH.float() @ a_RH.float().T) @ b_RO.float()
            delta_TO = delta_TO + (weight_T * stack.scales_NE[n, e])[:, None] * lora_TO
        deltas.append(delta_TO)
    return tuple(deltas)
