"""The banks that an MoA run starts from and ends with.

Shapes: R rank, H input features, O output features, D decoder layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from meteora_dist.adapters import Adapter, LoraPair, read_adapter
from meteora_dist.adapters.adapter import CONFIG_FILE
from meteora_dist.adapters.write import write_changed
from meteora_dist.bank import Bank, Routers, write_bank
from meteora_dist.bank.prototype import prototype_row
from meteora_dist.errors import BankError, ExpertNotFound
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routers import decoder_layers
from meteora_dist.training.moa_objective import MoaObjective


def first_bank(path: Path, base: Path, base_id: str, adapters: Path) -> Bank:
    """Writes a bank of all adapters below a folder, in alphabetical order, with prototype gates and no routers.

    Args:
        path: Where it goes.
        base: Folder of the base model.
        base_id: Its name, for people.
        adapters: Has one folder an expert, named like it.

    Raises:
        CheckpointError: There is no adapter, or one is damaged, or they do not fit each other.
    """
    folders = {file.parent.name: file.parent for file in sorted(adapters.glob(f"*/{CONFIG_FILE}"))}
    if not folders:
        raise BankError(adapters, f"has no folder with an {CONFIG_FILE}; it must have one folder an expert")
    gates = _prototypes({name: read_adapter(folder) for name, folder in folders.items()})
    return write_bank(path, base, base_id, folders, gates, prototypes=frozenset(folders))


def trained_experts(bank: Bank, names: Iterable[str]) -> tuple[int, ...]:
    """Indices of the experts of these names; all without any. Raises ExpertNotFound."""
    if unknown := [name for name in names if name not in bank.names]:
        raise ExpertNotFound(f"there is no expert {unknown[0]!r} to train; the bank has {', '.join(bank.names)}")
    return tuple(index for index, name in enumerate(bank.names) if not names or name in names)


def write_trained(path: Path, base: Path, bank: Bank, routed: RoutedModel, objective: MoaObjective) -> Bank:
    """Writes the bank that training has made of ``bank``, one generation on.

    Adapters and rows of experts that were not trained stay as they are, byte for byte. Gate rows stay: trained ones
    tell domains apart as before, and prototypes of trained adapters are made anew.

    Args:
        path: Where it goes; nothing may be there yet.
        base: Folder of the base model.
        bank: What training started from.
        routed: The model it was injected into.
        objective: What was trained.

    Raises:
        CheckpointError: Something is at ``path``, or files cannot be read or written.
    """
    with TemporaryDirectory(prefix=".moa.", dir=_parent(path)) as workshop:
        folders = {name: adapter.path for name, adapter in zip(bank.names, bank.adapters, strict=True)}
        if objective.settings.train_loras:
            for expert in objective.trained:
                name = bank.names[expert]
                adapter = bank.adapters[expert]
                folders[name] = write_changed(
                    adapter, Path(workshop) / name, _trained_pairs(adapter, objective, expert)
                )
        untrained = {entry.name for entry in bank.manifest.experts if entry.router == "none"}
        untrained -= {bank.names[expert] for expert in objective.trained}
        layers = decoder_layers(routed.model)
        routers = Routers(
            dict(zip(layers, objective.routers.detach().cpu(), strict=True)),
            objective.settings.pooling,
            frozenset(untrained),
        )
        prototypes = frozenset(name for name, made in zip(bank.names, bank.prototypes, strict=True) if made)
        return write_bank(
            path,
            base,
            bank.manifest.base_model,
            folders,
            _gates(bank, {name: read_adapter(folder) for name, folder in folders.items()}, objective),
            bank.manifest.routing,
            bank.manifest.generation + 1,
            routers,
            prototypes,
        )


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent


def _trained_pairs(adapter: Adapter, objective: MoaObjective, expert: int) -> dict[str, tuple[Tensor, Tensor]]:
    """a_RH and b_OR of every linear of a trained expert."""
    pairs = {linear: objective.pair(linear, expert) for linear in adapter.shapes}
    return {linear: (pair[0].cpu(), pair[1].cpu()) for linear, pair in pairs.items() if pair is not None}


def _gates(bank: Bank, adapters: Mapping[str, Adapter], objective: MoaObjective) -> dict[str, Tensor]:
    gates = {linear: bank.gate(linear) for linear in bank.linears}
    anew = [e for e in objective.trained if bank.prototypes[e]] if objective.settings.train_loras else []
    trained_E = ~torch.tensor(bank.prototypes)
    for linear, gate_EH in gates.items():
        for expert in anew:
            pair = _pair(adapters[bank.names[expert]], linear)
            gate_EH[expert] = prototype_row(pair, gate_EH, trained_E)
    return gates


def _prototypes(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """A prototype gate for every linear that at least one adapter adapts."""
    widths = {linear: shape.in_features for adapter in adapters.values() for linear, shape in adapter.shapes.items()}
    nobody = torch.zeros(len(adapters), dtype=torch.bool)
    return {
        linear: torch.stack(
            [
                prototype_row(_pair(adapter, linear), torch.zeros(len(adapters), width), nobody)
                for adapter in adapters.values()
            ]
        )
        for linear, width in widths.items()
    }


def _pair(adapter: Adapter, linear: str) -> LoraPair | None:
    return adapter.load(linear) if linear in adapter.shapes else None
