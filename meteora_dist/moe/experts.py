"""Reads what a rank holds of a group's experts and gates.

Shapes: N linears that share one input, H input width of this rank, O_n output widths of this rank, E experts,
P = N * E, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from meteora_dist.adapters import Adapter, PairPlace
from meteora_dist.bank import Bank
from meteora_dist.errors import AdapterError, BankError
from meteora_dist.moe.sharding import GroupShape
from meteora_kernels.routed_lora.plan import arrange, held_dtype, located, runs_kernels
from meteora_kernels.routed_lora.stack import Expert, LoraPart, LoraStack, stack


def unread_expert(adapter: Adapter, shape: GroupShape, dtype: torch.dtype, device: torch.device) -> Expert:
    """This rank's part of one expert at the linears of a group, with matrices that are not here yet.

    All ranks of a tp group cut the same digests alike, whenever they do.

    Args:
        adapter: The expert's.
        shape: Of the group.
        dtype: Of the linears' inputs; see ``held_dtype``.
        device: Where the matrices will be.

    Raises:
        AdapterError: The adapter is for linears of another shape.
    """
    return tuple(_unread(adapter, shape, linear, dtype, device) for linear in range(len(shape.names)))


def held_bytes(adapter: Adapter, dtype: torch.dtype, device_type: str) -> int:
    """Memory that an adapter's matrices take, on all ranks that share them; arguments as for ``held_dtype``."""
    return sum(
        shape.parameters * held_dtype(shape.dtype, dtype, device_type).itemsize for shape in adapter.shapes.values()
    )


def read_expert(adapter: Adapter, places: Iterable[tuple[GroupShape, Expert]]) -> None:
    """Reads this rank's part of one expert, at all groups of linears at once, and nothing else.

    Args:
        adapter: The expert's; hashed first.
        places: Every group, with the expert's matrices in its stack, to be filled.

    Raises:
        AdapterError: Its files have changed.
    """
    adapter.verify()
    adapter.read_into(
        PairPlace(name, shape.cut(linear, part.rank, adapter.digest), part.a_RH, part.b_RO)
        for shape, expert in places
        for linear, (name, part) in enumerate(zip(shape.names, expert, strict=True))
        if part
    )


def stack_experts(experts: Sequence[Expert], shape: GroupShape, dtype: torch.dtype, device: torch.device) -> LoraStack:
    """Experts of a group by local id, as its operators want them: few side by side in a copy, many as they are.

    There is room for the matrices of those that are not read yet.
    """
    return arrange(stack(experts, shape.local_inputs, shape.local_outputs, dtype, device))


def with_experts(stack: LoraStack, experts: Sequence[Expert]) -> LoraStack:
    """A stack of the same pairs with other matrices, which may have gradients; they are not copied side by side."""
    other = replace(stack, experts=tuple(experts), packed=None, tables=None, compiled=None)
    return located(other) if runs_kernels(stack.scales_NE.device) else other


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


def _unread(
    adapter: Adapter, shape: GroupShape, linear: int, dtype: torch.dtype, device: torch.device
) -> LoraPart | None:
    if not _adapts(adapter, shape, linear):
        return None
    known = adapter.shapes[shape.names[linear]]
    cut = shape.cut(linear, known.rank, adapter.digest)
    held = held_dtype(known.dtype, dtype, device.type)

    def unread(rows: slice, columns: slice) -> Tensor:
        return torch.empty(rows.stop - rows.start, columns.stop - columns.start, dtype=held, device="meta")

    return LoraPart(
        a_RH=unread(cut.ranks_a, cut.inputs),
        b_RO=unread(cut.ranks_b, cut.outputs),
        scale=known.scale,
        rank=known.rank,
        first_a=cut.ranks_a.start,
        first_b=cut.ranks_b.start,
    )
