"""Experts that join a bank, and the gate rows they bring: their own, or prototypes.

Shapes: E experts, H input features of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from meteora_dist.adapters import Adapter
from meteora_dist.bank.prototype import prototype_row
from meteora_dist.bank.rows import ROWS_FILE, read_rows


@dataclass(frozen=True, slots=True)
class NewExpert:
    """An expert that joins a bank.

    Attributes:
        adapter: Folder of its adapter, as PEFT wrote it.
        gate_rows: File of its gate rows, see ``read_rows``. None for ``gate_rows.safetensors`` beside the adapter; if
            there is no such file, the rows are prototypes made from the adapter.

    Router rows, for a bank with routers, come from ``router_rows.safetensors`` beside the adapter; see ``edit_bank``.
    """

    adapter: Path
    gate_rows: Path | None = None


def widths_of(experts: Mapping[str, Adapter]) -> dict[str, int]:
    """Input features of every linear that at least one expert adapts."""
    return {linear: shape.in_features for adapter in experts.values() for linear, shape in adapter.shapes.items()}


def given_rows(expert: NewExpert, adapter: Adapter, widths: Mapping[str, int]) -> dict[str, Tensor] | None:
    """The rows that come with an expert, [H] by linear; None when none do."""
    path = expert.gate_rows or expert.adapter / ROWS_FILE
    if expert.gate_rows is None and not path.exists():
        return None
    return read_rows(path, adapter, widths)


def new_row(
    linear: str, adapter: Adapter, given: Mapping[str, Tensor] | None, beside_EH: Tensor, trained_E: Tensor
) -> Tensor:
    """The gate row [H] of an expert that joins, at one linear.

    Args:
        linear: Its path.
        adapter: The expert's.
        given: The rows the expert brings; None for a prototype.
        beside_EH: The rows it joins.
        trained_E: Which of those were trained, bool.
    """
    if given is not None:
        return given[linear]
    pair = adapter.load(linear) if linear in adapter.shapes else None
    return prototype_row(pair, beside_EH, trained_E)
