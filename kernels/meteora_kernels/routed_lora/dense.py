"""Routed LoRA, dense regime: every token meets every expert's A, and the weights pick what counts.

One product for all shrinks, one mask-and-scale, one product a linear for the expands: no sort, no gather, static
shapes. It reads the whole stack, so it is for few experts (see ``plan``). Formula and twin: ``reference.py``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from meteora_kernels.routed_lora.stack import Expert, LoraPart, LoraStack, Packed


def routed_lora_dense(x_TH: Tensor, stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> tuple[Tensor, ...]:
    """The deltas of the N linears, each [T, O_n], in x's dtype. Arguments as in the reference; a packed stack."""
    packed = _packed(stack)
    shrunk_TC = linear(x_TH, packed.a_CH.to(x_TH.dtype)) * _row_weights(stack, ids_TNK, weights_TNK).to(x_TH.dtype)
    parts = shrunk_TC.split([len(b_CO) for b_CO in packed.b_CO], dim=1)
    return tuple(part_TC @ b_CO.to(x_TH.dtype) for part_TC, b_CO in zip(parts, packed.b_CO, strict=True))


def _row_weights(stack: LoraStack, ids_TNK: Tensor, weights_TNK: Tensor) -> Tensor:
    """What rows of A count for every token: weights_TC, weight times scale of their pair, 0 where it is not used."""
    tokens, linears = ids_TNK.shape[:2]
    weights_TNE = weights_TNK.new_zeros(tokens, linears, stack.num_experts)
    # An empty slot points at expert 0 with weight 0 and adds nothing.
    weights_TNE.scatter_add_(2, ids_TNK.clamp_min(0), weights_TNK).mul_(stack.scales_NE)
    return weights_TNE.flatten(1).index_select(1, _packed(stack).pair_of_C)


def _packed(stack: LoraStack) -> Packed:
    assert stack.packed is not None, "the dense regime reads packed matrices"
    return stack.packed


def pack(stack: LoraStack) -> LoraStack:
    """A stack of whole pairs with its matrices side by side; its experts view them, so nothing is held twice.

    What is not here yet (see ``stack.py``) has room there, uninitialised.
    """
    assert stack.whole, "parts of pairs cannot be packed"
    (dtype,) = stack.matrix_dtypes
    held = [
        [(e, part) for e, expert in enumerate(stack.experts) if (part := expert[n])] for n in range(stack.num_linears)
    ]
    owners = [n * stack.num_experts + e for n, row in enumerate(held) for e, part in row for _ in range(part.rank)]
    empty = partial(torch.empty, dtype=dtype, device=stack.scales_NE.device)
    packed = Packed(
        a_CH=empty(len(owners), stack.in_features),
        b_CO=tuple(empty(rows, width) for rows, width in zip(stack.columns, stack.out_features, strict=True)),
        pair_of_C=torch.tensor(owners, dtype=torch.long, device=stack.scales_NE.device),
    )
    return replace(stack, experts=_moved(stack, packed), packed=packed)


def _moved(stack: LoraStack, packed: Packed) -> tuple[Expert, ...]:
    """The experts with their matrices copied into ``packed``."""
    experts: list[list[LoraPart | None]] = [[None] * stack.num_linears for _ in stack.experts]
    row_a = 0
    for n, b_CO in enumerate(packed.b_CO):
        row_b = 0
        for e, expert in enumerate(stack.experts):
            if part := expert[n]:
                rows = part.rank
                a_RH, b_RO = packed.a_CH[row_a : row_a + rows], b_CO[row_b : row_b + rows]
                if not part.a_RH.is_meta:
                    a_RH.copy_(part.a_RH)
                    b_RO.copy_(part.b_RO)
                experts[e][n] = replace(part, a_RH=a_RH, b_RO=b_RO)
                row_a, row_b = row_a + rows, row_b + rows
    return tuple(tuple(expert) for expert in experts)
