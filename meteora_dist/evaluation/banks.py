"""Banks that baselines run on, made beside the evaluated one: the same engine answers for all methods.

A merged adapter is an expert like any other, asked for by name; Arrow is ``auto`` on a bank of prototype gates.

Shapes: E experts, H input features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from meteora_dist.adapters import read_adapter
from meteora_dist.bank import Bank, write_bank
from meteora_dist.bank.prototype import prototype_row
from meteora_dist.bank.write import Draft, place


def prototype_bank(bank: Bank, folder: Path) -> Bank:
    """The bank's experts with gates made of their own matrices: unit prototypes, see ``docs/decisions/0006``."""
    manifest = bank.manifest
    gates = {}
    for linear in bank.linears:
        pairs = [bank.pair(linear, expert) for expert in range(len(bank.names))]
        none_EH = bank.gate(linear)[:0]
        rows = [prototype_row(pair, none_EH, torch.zeros(0, dtype=torch.bool)) for pair in pairs]
        gates[linear] = torch.stack(rows)
    names = frozenset(bank.names)
    experts = dict(zip(bank.names, bank.adapters, strict=True))
    draft = Draft(
        base_id=manifest.base_model,
        base_fingerprint=manifest.base_fingerprint,
        experts=experts,
        gates=gates,
        routing=manifest.routing,
        generation=1,
        prototypes=names,
        linked=names,
    )
    return place(folder, draft)


def named_bank(bank: Bank, model: Path, adapters: Mapping[str, Path], folder: Path) -> Bank:
    """A bank of other adapters for the same base model, to be asked for by name; its gates are zeros."""
    widths = {
        linear: shape.in_features for home in adapters.values() for linear, shape in read_adapter(home).shapes.items()
    }
    gates = {linear: torch.zeros(len(adapters), width) for linear, width in widths.items()}
    return write_bank(folder, model, bank.manifest.base_model, adapters, gates)
