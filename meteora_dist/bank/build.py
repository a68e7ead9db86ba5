"""A new bank of adapters that nobody trained gates for: rows that come with them, prototypes otherwise.

Shapes: E experts, H input features of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from meteora_dist.adapters import read_adapter
from meteora_dist.bank.bank import Bank
from meteora_dist.bank.joining import NewExpert, given_rows, new_row, widths_of
from meteora_dist.bank.manifest import RoutingDefaults
from meteora_dist.bank.write import check_new, write_bank


def build_bank(
    path: Path, base: Path, base_id: str, experts: Mapping[str, NewExpert], routing: RoutingDefaults | None = None
) -> Bank:
    """Writes a bank whose gates need no training, and opens it.

    Prototypes stand beside trained rows as ``docs/decisions/0006`` has it: their length is the mean length of those.

    Args:
        path: Where it goes; nothing may be there yet.
        base: Folder of the base model.
        base_id: Its name, for people.
        experts: By name, in the order of the gates' rows.
        routing: Defaults of requests; None for top-2 ``auto``.

    Raises:
        BankError: ``path`` exists, a name is not allowed, or rows and adapters do not fit each other.
        AdapterError: An adapter is damaged or asks for something unsupported.
        ModelError: The base model's files are missing or damaged.
    """
    check_new(path, experts)
    adapters = {name: read_adapter(expert.adapter) for name, expert in experts.items()}
    widths = widths_of(adapters)
    given = {name: given_rows(expert, adapters[name], widths) for name, expert in experts.items()}
    trained = [rows for rows in given.values() if rows is not None]
    gates = {}
    for linear, width in widths.items():
        beside_EH = torch.stack([rows[linear] for rows in trained]) if trained else torch.zeros(0, width)
        all_E = torch.ones(len(trained), dtype=torch.bool)
        rows_of = [new_row(linear, adapters[name], given[name], beside_EH, all_E) for name in experts]
        gates[linear] = torch.stack(rows_of)
    prototypes = frozenset(name for name, rows in given.items() if rows is None)
    folders = {name: expert.adapter for name, expert in experts.items()}
    return write_bank(path, base, base_id, folders, gates, routing, prototypes=prototypes)
