"""Reads what a rank holds of a group's experts and gates.

Shapes: N linears that share one input, H input width of this rank, O_n output widths of this rank, E experts,
P = N * E, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meteora_dist.adapters import Adapter, LoraPair, PairCut
from meteora_dist.bank import Bank
from meteora_dist.errors import AdapterError, BankError
from meteora_dist.moe.sharding import GroupShape
from meteora_kernels.routed_lora.plan import arrange
from meteora_kernels.routed_lora.stack import Expert, LoraPart, LoraStack, stack


def read_expert(adapter: Adapter, shape: GroupShape, dtype: torch.dtype, device: torch.device) -> Expert:
    """This rank's part of one expert at the linears of a group; nothing else is kept in memory.

    All ranks of a tp group read the same digests alike, whenever they read them.

    Raises:
        AdapterError: The adapter is for linears of another shape, or its file has changed.
    """
    cuts = {
        name: shape.cut(linear, adapter.shapes[name].rank, adapter.digest)
        for linear, name in enumerate(shape.names)
        if _adapts(adapter, shape, linear)
    }
    pairs = dict(zip(cuts, adapter.load_all(list(cuts.items()), device, dtype), strict=True))
    return tuple(_part(adapter, name, cuts[name], pairs[name]) if name in pairs else None for name in shape.names)


def stack_experts(experts: Sequence[Expert], shape: GroupShape, dtype: torch.dtype, device: torch.device) -> LoraStack:
    """Experts of a group by local id, as its operators want them: few side by side in a copy, many as they are."""
    return arrange(stack(experts, shape.local_inputs, shape.local_outputs, dtype, device))


def read_gates(bank: Bank, shape: GroupShape, device: torch.device) -> Tensor:
    """This rank's part of a group's gates, stacked: gate_PH, fp32, over all experts of the bank.

    Linears that no expert of the bank adapts have rows of zeros.

    Raises:
        BankError: The file has changed, or a gate does not fit the base model.
    """
    return torch.cat([_gate(bank, shape, name) for name in shape.names]).to(device)


def _gate(bank: Bank, shape: GroupShape, name: str) -> Tensor:
    info = bank.gate_header.tensors.get(name)
    if info is None:
        return torch.zeros(len(bank.names), shape.local_inputs)
    if info.shape[1] != shape.in_features:
        raise BankError(
            bank.path, f"the gate of {name} reads {info.shape[1]} features; the base model has {shape.in_features}"
        )
    return bank.gate(name, shape.inputs)


def _adapts(adapter: Adapter, shape: GroupShape, linear: int) -> bool:
    name, out_features = shape.names[linear], shape.out_features[linear]
    known = adapter.shapes.get(name)
    if known is None:
        return False
    if (known.in_features, known.out_features) != (shape.in_features, out_features):
        raise AdapterError(
            adapter.path,
            f"maps {known.in_features} to {known.out_features} features at {name}; the base model maps "
            f"{shape.in_features} to {out_features}",
        )
    return True


def _part(adapter: Adapter, name: str, cut: PairCut, pair: LoraPair) -> LoraPart:
    return LoraPart(
        a_RH=pair.a_RH,
        b_RO=pair.b_OR.T.contiguous(),
        scale=pair.scale,
        rank=adapter.shapes[name].rank,
        first_a=cut.ranks_a.start,
        first_b=cut.ranks_b.start,
    )
