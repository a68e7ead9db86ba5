"""Routed LoRA, grouped regime: (token, slot) pairs sorted by expert, each expert sees only its own tokens.

It reads only the experts in use, so it is for many experts. Sums run in a fixed order (expert, then token), so the
result does not depend on what else is in the batch. Formula and twin: ``reference.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from meteora_kernels.routed_lora.stack import LoraStack


def routed_lora_grouped(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], in x's dtype. Arguments as in the reference."""
    return tuple(
        _one_linear(x_TH, stack, n, ids_TNK[:, n].flatten(), weights_TNK[:, n].flatten())
        for n in range(stack.num_linears)
    )


def _one_linear(x_TH: Tensor, stack: LoraStack, n: int, ids_P: Tensor, weights_P: Tensor) -> Tensor:
    slots = ids_P.numel() // max(x_TH.shape[0], 1)
    delta_TO = x_TH.new_zeros(x_TH.shape[0], stack.b_CO[n].shape[1], dtype=torch.float32)
    order_P = torch.argsort(ids_P, stable=True)
    counts = torch.bincount(ids_P + 1, minlength=stack.num_experts + 1).tolist()
    # Bin 0 counts the empty slots, which sort first.
    first = counts[0]
    for expert, count in enumerate(counts[1:]):
        a_RH, b_RO = stack.pair(n, expert)
        if count and a_RH.shape[0]:
            pairs_P = order_P[first : first + count]
            tokens_P = pairs_P // slots
            scales_P1 = (weights_P[pairs_P] * stack.scales_NE[n, expert])[:, None]
            shrunk_PR = linear(x_TH[tokens_P], a_RH) * scales_P1.to(x_TH.dtype)
            delta_TO.index_add_(0, tokens_P, (shrunk_PR @ b_RO).float())
        first += count
    return delta_TO.to(x_TH.dtype)
