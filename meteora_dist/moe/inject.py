"""Puts routed linears into a transformers causal language model, from outside."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from meteora_dist.bank import Bank
from meteora_dist.errors import BankError
from meteora_dist.moe.dispatcher import Dispatcher, LocalDispatcher, targets_of
from meteora_dist.moe.experts import read_expert, read_gates, stack_experts
from meteora_dist.moe.layer import GroupState, RoutedGroup, RoutingContext, SharedDeltas
from meteora_dist.moe.linears import SHARED_INPUTS
from meteora_dist.moe.placement import Placement, contiguous
from meteora_dist.moe.sharding import GroupShape
from meteora_dist.moe.tensor_parallel import TensorParallel, routed_linear, split_of
from meteora_dist.moe.wire import Wire


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands among those that share the experts.

    Attributes:
        group: Number of its expert-parallel group.
        dispatcher: Brings rows to the groups that own their experts; by default nothing travels.
        wire: Counts what it hands over; the dispatcher's own.
    """

    group: int = 0
    dispatcher: Dispatcher = field(default_factory=LocalDispatcher)
    wire: Wire = field(default_factory=Wire)


@dataclass(frozen=True, slots=True)
class RoutedModel:
    """A causal language model with routed linears.

    Attributes:
        model: The transformers model; its passes are routed by ``context``.
        groups: The routed groups in the order a pass meets them.
        context: How the pass under way is routed.
        num_experts: E, of the whole bank.
        dispatcher: Of all groups.
        wire: Counts what this rank hands over in the exchanges of its routed linears.
    """

    model: PreTrainedModel
    groups: tuple[RoutedGroup, ...]
    context: RoutingContext
    num_experts: int
    dispatcher: Dispatcher
    wire: Wire

    @property
    def num_linears(self) -> int:
        """Routed linears of the whole model."""
        return sum(len(group.names) for group in self.groups)

    def serve(self, slots: int) -> None:
        """Serves this rank's experts through one whole pass of the other ranks, without a base forward."""
        for group in self.groups:
            group.serve(slots)


def inject(
    model: PreTrainedModel,
    bank: Bank,
    dtype: torch.dtype,
    placement: Placement | None = None,
    place: Place | None = None,
) -> RoutedModel:
    """Replaces every linear the bank targets by a routed one.

    Args:
        model: A causal language model with the usual projection names (Llama, Qwen, Mistral ...), changed in place; on
            the ranks of a tp group, each with its part of it.
        bank: Gates of all experts, and the pairs of those placed here.
        dtype: Of this rank's experts.
        placement: Of the bank's experts, each in the slot of its index; by default one group holds all.
        place: This rank's; by default it is alone.

    Raises:
        CheckpointError: The bank targets a linear the model lacks, or of another shape, or split in another way than
            by outputs or by inputs.
    """
    place = place or Place()
    placement = placement or contiguous(len(bank.names), 1)
    targets_DG = targets_of(placement, place.group, model.device)
    tp = TensorParallel.of(model, place.wire)
    context = RoutingContext()
    groups = []
    for names in _grouped(model, bank):
        shape = _shape(model, bank, names, tp)
        adapters = [bank.adapters[slot] for slot in placement.slots_of(place.group)]
        experts = [read_expert(adapter, shape, dtype, model.device) for adapter in adapters]
        state = GroupState(
            gates=(read_gates(bank, shape, model.device),),
            targets_DG=targets_DG,
            stack=stack_experts(experts, shape, dtype, model.device),
        )
        group = RoutedGroup(shape, state, place.dispatcher, context, None if tp is None else tp.add_up)
        shared = SharedDeltas(group)
        for index, name in enumerate(names):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, routed_linear(model, name, tp, shared, index))
        groups.append(group)
    return RoutedModel(model, tuple(groups), context, len(bank.names), place.dispatcher, place.wire)


def _grouped(model: nn.Module, bank: Bank) -> list[tuple[str, ...]]:
    """The bank's linears, those with a shared input together, in the order a pass meets them."""
    targeted = set(bank.linears)
    groups = []
    for block, leaves in _blocks(model):
        for shared in SHARED_INPUTS:
            names = tuple(f"{block}.{leaf}" for leaf in shared if leaf in leaves and f"{block}.{leaf}" in targeted)
            if names:
                groups.append(names)
                targeted.difference_update(names)
    if targeted:
        known = sorted({leaf for shared in SHARED_INPUTS for leaf in shared})
        raise BankError(
            bank.path, f"targets {sorted(targeted)[0]}, which the base model lacks; routed linears are {known}"
        )
    return groups


def _blocks(model: nn.Module) -> list[tuple[str, set[str]]]:
    """(path, names of its linears) of every module with linears, in model order."""
    found = []
    for path, module in model.named_modules():
        leaves = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
        if leaves:
            found.append((path, leaves))
    return found


def _shape(model: PreTrainedModel, bank: Bank, names: tuple[str, ...], tp: TensorParallel | None) -> GroupShape:
    linears = [_linear(model, bank, name) for name in names]
    out_features = tuple(linear.out_features for linear in linears)
    if tp is None:
        return GroupShape(names, linears[0].in_features, out_features)
    splits = {split_of(model, name) for name in names}
    split = splits.pop()
    if split is None or splits:
        raise BankError(
            bank.path,
            f"targets {', '.join(names)}; a tp group can share such linears only where the base model's plan splits "
            "all of them by outputs (colwise) or all by inputs (rowwise)",
        )
    return GroupShape(names, linears[0].in_features, out_features, split, tp.size, tp.rank)


def _linear(model: nn.Module, bank: Bank, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"{name} was found among the linears"
    width = bank.gate_header.tensors[name].shape[1]
    if width != linear.in_features:
        raise BankError(
            bank.path, f"the gate of {name} reads {width} features; the base model has {linear.in_features}"
        )
    return linear
