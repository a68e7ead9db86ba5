"""Routed LoRA, grouped regime: (token, slot) pairs sorted by expert, each expert sees only its own tokens.

It reads only the experts in use, so it is for many experts. Sums run in a fixed order (expert, then token), so the
result does not depend on what else is in the batch. Formulas and twins: ``reference.py``.

Shapes: as there; P = T * K pairs of a token and a slot.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from meteora_kernels.routed_lora.stack import LoraPart, LoraStack


def routed_lora_grouped(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], in x's dtype. Arguments as in the reference; whole pairs only."""
    slots = ids_TNK.shape[-1]
    deltas = []
    for n, width in enumerate(stack.out_features):
        weights_P = weights_TNK[:, n].flatten()
        delta_TO = x_TH.new_zeros(x_TH.shape[0], width, dtype=torch.float32)
        for part, pairs_P in _by_expert(stack, n, ids_TNK):
            tokens_P = pairs_P // slots
            scales_P1 = (weights_P[pairs_P] * part.scale)[:, None]
            shrunk_PR = linear(x_TH[tokens_P], part.a_RH.to(x_TH.dtype)) * scales_P1.to(x_TH.dtype)
            delta_TO.index_add_(0, tokens_P, (shrunk_PR @ part.b_RO.to(x_TH.dtype)).float())
        deltas.append(delta_TO.to(x_TH.dtype))
    return tuple(deltas)


def shrink_grouped(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor) -> Tensor:
    """The shrunk inputs [T, N, K, R], fp32. Arguments as in the reference."""
    slots = ids_TNK.shape[-1]
    by_linear = []
    for n in range(stack.num_linears):
        shrunk_PR = x_TH.new_zeros(x_TH.shape[0] * slots, stack.max_rank, dtype=torch.float32)
        for part, pairs_P in _by_expert(stack, n, ids_TNK):
            ranks = slice(part.first_a, part.first_a + part.a_RH.shape[0])
            shrunk_PR[pairs_P, ranks] = linear(x_TH[pairs_P // slots], part.a_RH.to(x_TH.dtype)).float()
        by_linear.append(shrunk_PR.view(x_TH.shape[0], slots, stack.max_rank))
    return torch.stack(by_linear, dim=1)


def expand_grouped(shrunk_TNKR: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], in the dtype of the stack. Arguments as in the reference."""
    slots = ids_TNK.shape[-1]
    deltas = []
    for n, width in enumerate(stack.out_features):
        weights_P, shrunk_PR = weights_TNK[:, n].flatten(), shrunk_TNKR[:, n].flatten(0, 1)
        delta_TO = shrunk_TNKR.new_zeros(shrunk_TNKR.shape[0], width)
        for part, pairs_P in _by_expert(stack, n, ids_TNK):
            ranks = slice(part.first_b, part.first_b + part.b_RO.shape[0])
            scaled_PR = shrunk_PR[pairs_P, ranks] * (weights_P[pairs_P] * part.scale)[:, None]
            expanded_PO = scaled_PR.to(stack.dtype) @ part.b_RO.to(stack.dtype)
            delta_TO.index_add_(0, pairs_P // slots, expanded_PO.float())
        deltas.append(delta_TO.to(stack.dtype))
    return tuple(deltas)


def _by_expert(stack: LoraStack, n: int, ids_TNK: Tensor) -> Iterator[tuple[LoraPart, Tensor]]:
    """Every expert in use at linear n, with its pairs: numbers t * K + k, rising."""
    ids_P = ids_TNK[:, n].flatten()
    order_P = torch.argsort(ids_P, stable=True)
    counts = torch.bincount(ids_P + 1, minlength=stack.num_experts + 1).tolist()
    # Bin 0 counts the empty slots, which sort first.
    first = counts[0]
    for expert, count in zip(stack.experts, counts[1:], strict=True):
        if count and (part := expert[n]) is not None:
            yield part, order_P[first : first + count]
        first += count
