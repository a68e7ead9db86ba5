"""Puts routed linears into a transformers causal language model, from outside."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from meteora_dist.bank import Bank
from meteora_dist.errors import BankError
from meteora_dist.moe.dispatcher import Dispatcher, LocalDispatcher, targets_of
from meteora_dist.moe.layer import GroupState, RoutedGroup, RoutedLinear, RoutingContext, SharedDeltas
from meteora_dist.moe.linears import SHARED_INPUTS
from meteora_dist.moe.placement import Placement, contiguous
from meteora_kernels.routed_lora.plan import arrange
from meteora_kernels.routed_lora.stack import LoraPart, stack, whole_part


@dataclass(frozen=True, slots=True)
class RoutedModel:
    """A causal language model with routed linears.

    Attributes:
        model: The transformers model; its passes are routed by ``context``.
        groups: The routed groups in the order a pass meets them.
        context: How the pass under way is routed.
        num_experts: E, of the whole bank.
    """

    model: PreTrainedModel
    groups: tuple[RoutedGroup, ...]
    context: RoutingContext
    num_experts: int

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
    group: int = 0,
    dispatcher: Dispatcher | None = None,
) -> RoutedModel:
    """Replaces every linear the bank targets by a routed one.

    Args:
        model: A causal language model with the usual projection names (Llama, Qwen, Mistral ...), changed in place.
        bank: Gates of all experts, and the pairs of those placed here.
        dtype: Of this rank's experts.
        placement: Of the bank's experts, each in the slot of its index; by default one group holds all.
        group: This rank's.
        dispatcher: Brings rows to their experts; by default nothing travels.

    Raises:
        BankError: The bank targets a linear the model lacks, or of another shape.
    """
    placement = placement or contiguous(len(bank.names), 1)
    targets_DG = targets_of(placement, group)
    context = RoutingContext()
    groups = []
    for names in _grouped(model, bank):
        linears = [_linear(model, bank, name) for name in names]
        experts = [
            tuple(_part(bank, name, linear, slot, dtype) for name, linear in zip(names, linears, strict=True))
            for slot in placement.slots_of(group)
        ]
        pairs = stack(experts, linears[0].in_features, [linear.out_features for linear in linears], dtype)
        gate_PH = torch.cat([bank.gate(name) for name in names])
        state = GroupState((gate_PH,), targets_DG, arrange(pairs))
        routed = RoutedGroup(names, state, dispatcher or LocalDispatcher(), context)
        shared = SharedDeltas(routed)
        for index, (name, linear) in enumerate(zip(names, linears, strict=True)):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, RoutedLinear(linear, shared, index))
        groups.append(routed)
    return RoutedModel(model, tuple(groups), context, len(bank.names))


def _part(bank: Bank, name: str, linear: nn.Linear, expert: int, dtype: torch.dtype) -> LoraPart | None:
    pair = bank.pair(name, expert, dtype=dtype)
    if pair is None:
        return None
    if pair.b_OR.shape[0] != linear.out_features:
        raise BankError(
            bank.path,
            f"expert {bank.names[expert]} writes {pair.b_OR.shape[0]} features at {name}; "
            f"the base model has {linear.out_features}",
        )
    return whole_part((pair.a_RH, pair.b_OR, pair.scale), dtype)


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


def _linear(model: nn.Module, bank: Bank, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear), f"{name} was found among the linears"
    width = bank.gate(name).shape[1]
    if width != linear.in_features:
        raise BankError(
            bank.path, f"the gate of {name} reads {width} features; the base model has {linear.in_features}"
        )
    return linear
