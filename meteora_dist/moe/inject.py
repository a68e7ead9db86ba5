"""Puts routed linears into a transformers causal language model, from outside."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from meteora_dist.bank import Bank
from meteora_dist.errors import BankError
from meteora_dist.moe.holdings import Holdings, first_states
from meteora_dist.moe.layer import DeltaSource, RoutedGroup, RoutingContext, SharedDeltas
from meteora_dist.moe.linears import SHARED_INPUTS
from meteora_dist.moe.placement import Placement
from meteora_dist.moe.residency import Residency
from meteora_dist.moe.routed_model import Place, RoutedModel
from meteora_dist.moe.sharding import GroupShape
from meteora_dist.moe.tensor_parallel import TensorParallel, routed_linear, split_of


def inject(
    model: PreTrainedModel,
    bank: Bank,
    dtype: torch.dtype,
    placement: Placement | None = None,
    place: Place | None = None,
    before: Callable[[RoutedGroup], DeltaSource] | None = None,
) -> RoutedModel:
    """Replaces every linear a bank targets by a routed one; see ``inject_holdings``.

    Args:
        model: Changed in place.
        bank: The only generation.
        dtype: Of the model; its experts', see ``held_dtype``.
        placement: Of the bank's adapters, each in the slot of its index; by default one group holds all.
        place: This rank's; by default it is alone.
        before: Makes what stands between a group and its linears; None for nothing.

    Raises:
        CheckpointError: The bank does not fit the model.
    """
    residency = Residency.of(bank, 1 if placement is None else placement.groups)
    if placement is not None:
        residency = residency.placed(placement)
    return inject_holdings(model, Holdings(residency, {bank.manifest.generation: bank}), dtype, place, before)


def inject_holdings(
    model: PreTrainedModel,
    holdings: Holdings,
    dtype: torch.dtype,
    place: Place | None = None,
    before: Callable[[RoutedGroup], DeltaSource] | None = None,
) -> RoutedModel:
    """Replaces every linear that a live generation targets by a routed one.

    Args:
        model: A causal language model with the usual projection names (Llama, Qwen, Mistral ...), changed in place; on
            the ranks of a tp group, each with its part of it.
        holdings: The live generations, and who holds what of them.
        dtype: Of the model; its experts', see ``held_dtype``.
        place: This rank's; by default it is alone.
        before: Makes what stands between a group and its linears; None for nothing.

    Raises:
        CheckpointError: A bank targets a linear the model lacks, or of another shape, or split in another way than by
            outputs or by inputs.
    """
    place = place or Place()
    tp = TensorParallel.of(model, place.wire)
    context = RoutingContext(holdings.residency.roster.slots)
    shapes = [_shape(model, holdings, names, tp) for names in _grouped(model, holdings)]
    groups = []
    for shape, state in zip(shapes, first_states(shapes, holdings, place.group, dtype, model.device), strict=True):
        group = RoutedGroup(shape, state, place.dispatcher, context, None if tp is None else tp.add_up)
        shared = SharedDeltas(group if before is None else before(group))
        for index, name in enumerate(shape.names):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, routed_linear(model, name, tp, shared, index))
        groups.append(group)
    return RoutedModel(model, tuple(groups), context, place, holdings)


def _grouped(model: nn.Module, holdings: Holdings) -> list[tuple[str, ...]]:
    """The targeted linears, those with a shared input together, in the order a pass meets them."""
    targeted = set(holdings.linears)
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
            _path(holdings, targeted),
            f"targets {sorted(targeted)[0]}, which the base model lacks; routed linears are {known}",
        )
    return groups


def _path(holdings: Holdings, linears: Collection[str]) -> Path:
    """Of a bank that targets one of ``linears``."""
    return next(bank.path for bank in holdings.banks.values() if not set(linears).isdisjoint(bank.linears))


def _blocks(model: nn.Module) -> list[tuple[str, set[str]]]:
    """(path, names of its linears) of every module with linears, in model order."""
    found = []
    for path, module in model.named_modules():
        leaves = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
        if leaves:
            found.append((path, leaves))
    return found


def _shape(model: PreTrainedModel, holdings: Holdings, names: tuple[str, ...], tp: TensorParallel | None) -> GroupShape:
    linears = [model.get_submodule(name) for name in names]
    out_features = tuple(linear.out_features for linear in linears if isinstance(linear, nn.Linear))
    in_features = {linear.in_features for linear in linears if isinstance(linear, nn.Linear)}.pop()
    if tp is None:
        return GroupShape(names, in_features, out_features)
    splits = {split_of(model, name) for name in names}
    split = splits.pop()
    if split is None or splits:
        raise BankError(
            _path(holdings, names),
            f"targets {', '.join(names)}; a tp group can share such linears only where the base model's plan splits "
            "all of them by outputs (colwise) or all by inputs (rowwise)",
        )
    return GroupShape(names, in_features, out_features, split, tp.size, tp.rank)
