"""Routed LoRA: what the routed experts add to N linears that share one input.

    delta_n[t] = sum_k w[t,n,k] * s[n,e] * (x[t] A[n,e]^T) B[n,e]^T,   e = ids[t,n,k]

It is an expand after a shrink, and between the two a slot is a vector of its expert's rank. Processes that hold parts
of the pairs each shrink and expand by their parts, and add up either what they shrank or what they expanded.

This is the readable twin, one expert at a time in fp32. MeteoRA, arXiv 2405.13053.

Shapes: T tokens, H input width, O_n output width, N linears, K slots, R largest rank of the stack. An id of -1 is an
empty slot.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    return expand_reference(shrink_reference(x_TH, stack, ids_TNK), stack, ids_TNK, weights_TNK)


def shrink_reference(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor) -> Tensor:
    """``x[t] A[n,e]^T`` of every slot: [T, N, K, R], fp32, 0 in ranks that are not held here. Arguments as above."""
    shrunk_TNKR = x_TH.new_zeros(*ids_TNK.shape, stack.max_rank, dtype=torch.float32)
    for e, expert in enumerate(stack.experts):
        for n, part in enumerate(expert):
            if part is not None:
                product_T1R = (x_TH.float() @ part.a_RH.float().T)[:, None]
                ranks = slice(part.first_a, part.first_a + part.a_RH.shape[0])
                shrunk_TNKR[:, n, :, ranks] += torch.where((ids_TNK[:, n] == e)[..., None], product_T1R, 0.0)
    return shrunk_TNKR


def expand_reference(shrunk_TNKR: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], fp32, from the slots' shrunk inputs and the ranks held here."""
    deltas = []
    for n, width in enumerate(stack.out_features):
        delta_TO = shrunk_TNKR.new_zeros(shrunk_TNKR.shape[0], width)
        for e, expert in enumerate(stack.experts):
            if (part := expert[n]) is not None:
                weights_TK = torch.where(ids_TNK[:, n] == e, weights_TNK[:, n], 0.0) * part.scale
                ranks = slice(part.first_b, part.first_b + part.b_RO.shape[0])
                scaled_TR = (weights_TK[..., None] * shrunk_TNKR[:, n, :, ranks]).sum(1)
                delta_TO = delta_TO + scaled_TR @ part.b_RO.float()
        deltas.append(delta_TO)
    return tuple(deltas)


def outer_reference(
    shrunk_TNKR: Tensor, x_N: Sequence[Tensor], stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor, of_a: bool
) -> list[Tensor]:
    """Gradients of A, or of transposed B, by linear, then by expert: sum over pairs of w s z^T x, fp32.

    Args:
        shrunk_TNKR: x A^T of every slot for B; for A, dy B of every slot.
        x_N: For each linear what meets it, [T, width]: dy for B; for A, the input.
        stack: The experts.
        ids_TNK: Expert of every slot.
        weights_TNK: Weight of every slot.
        of_a: Whether of the A matrices.
    """
    gradients = []
    for n, x_TW in enumerate(x_N):
        for e, expert in enumerate(stack.experts):
            if (part := expert[n]) is not None:
                matrix, first = (part.a_RH, part.first_a) if of_a else (part.b_RO, part.first_b)
                weights_TK = torch.where(ids_TNK[:, n] == e, weights_TNK[:, n], 0.0) * part.scale
                z_TR = (weights_TK[..., None] * shrunk_TNKR[:, n, :, first : first + matrix.shape[0]]).sum(1)
                gradients.append(z_TR.T @ x_TW.float())
    return gradients
