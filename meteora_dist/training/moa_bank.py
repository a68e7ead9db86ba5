"""The banks that an MoA run starts from and ends with.

Shapes: R rank, H input features, O output features, D decoder layers, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from meteora_dist.adapters import Adapter, LoraPair, read_adapter
from meteora_dist.bank import Bank, Routers, write_bank
from meteora_dist.bank.gates import model_order
from meteora_dist.bank.prototype import prototype_row
from meteora_dist.errors import ExpertNotFound
from meteora_dist.training.settings import MoaRun
from meteora_dist.training.trained_experts import write_trained_adapter


def first_bank(path: Path, base: Path, base_id: str, adapters: Mapping[str, Adapter]) -> Bank:
    """Writes a bank of these adapters, with prototype gates and no routers.

    Args:
        path: Where it goes.
        base: Folder of the base model.
        base_id: Its name, for people.
        adapters: By the experts' names, in their order.

    Raises:
        CheckpointError: They do not fit each other, or the bank cannot be written.
    """
    folders = {name: adapter.path for name, adapter in adapters.items()}
    return write_bank(path, base, base_id, folders, _prototypes(adapters), prototypes=frozenset(folders))


def trained_experts(names: Sequence[str], chosen: Collection[str]) -> tuple[str, ...]:
    """The experts to train, in the bank's order: all of its ``names``, or those that are chosen.

    Raises:
        ExpertNotFound: There is none of that name.
    """
    if unknown := [name for name in chosen if name not in names]:
        raise ExpertNotFound(f"there is no expert {unknown[0]!r} to train; the bank has {', '.join(names)}")
    return tuple(name for name in names if not chosen or name in chosen)


def write_trained(path: Path, run: MoaRun, trained: Mapping[str, Tensor]) -> Bank:
    """Writes the bank that training has made of the run's draft, one generation on.

    Adapters and rows of experts that were not trained stay as they are, byte for byte. Gate rows stay: trained ones
    tell domains apart as before, and prototypes of trained adapters are made anew.

    Args:
        path: Where it goes; nothing may be there yet.
        run: The run.
        trained: What its objective has exported.

    Raises:
        CheckpointError: Something is at ``path``, or files cannot be read or written.
    """
    bank = Bank.open(run.draft)
    adapters = dict(zip(bank.names, bank.adapters, strict=True))
    changed = run.trained if run.moa.lora_learning_rate is not None else ()
    for name in changed:
        folder = write_trained_adapter(run.folder / "adapters" / name, name, adapters[name], trained)
        adapters[name] = read_adapter(folder)
    untrained = {entry.name for entry in bank.manifest.experts if entry.router == "none"} - set(run.trained)
    return write_bank(
        path,
        run.base,
        bank.manifest.base_model,
        {name: adapter.path for name, adapter in adapters.items()},
        _gates(bank, adapters, changed),
        bank.manifest.routing,
        bank.manifest.generation + 1,
        Routers(_routers(bank, run.trained, trained), run.moa.pooling, frozenset(untrained)),
        frozenset(name for name, made in zip(bank.names, bank.prototypes, strict=True) if made),
    )


def _routers(bank: Bank, names: Sequence[str], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Routers [E, H] by layer: the bank's, or zeros, with the trained rows of the experts of these names."""
    rows = {name.removeprefix("router."): row_AH for name, row_AH in trained.items() if name.startswith("router.")}
    before = {}
    if bank.manifest.routers is not None:
        before = dict(zip(bank.router_layers, bank.routers(), strict=True))
    indices = torch.tensor(sorted(bank.names.index(name) for name in names))
    found = {}
    for layer in model_order(rows):
        router_EH = before.get(layer, torch.zeros(len(bank.names), rows[layer].shape[1]))
        found[layer] = router_EH.index_copy(0, indices, rows[layer])
    return found


def _gates(bank: Bank, adapters: Mapping[str, Adapter], changed: Sequence[str]) -> dict[str, Tensor]:
    """The bank's gates, with new prototypes of the ``changed`` adapters that have some."""
    gates = {linear: bank.gate(linear) for linear in bank.linears}
    trained_E = ~torch.tensor(bank.prototypes)
    for linear, gate_EH in gates.items():
        for name in changed:
            if bank.prototypes[expert := bank.names.index(name)]:
                gate_EH[expert] = prototype_row(_pair(adapters[name], linear), gate_EH, trained_E)
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
