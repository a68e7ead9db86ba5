"""What differs between two banks.

Shapes: E experts, H input features of a linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from meteora_dist.bank.bank import Bank
from meteora_dist.bank.manifest import ExpertEntry


@dataclass(frozen=True, slots=True)
class BankDiff:
    """How bank B differs from bank A.

    Attributes:
        settings: Fields of bank.json outside the experts that differ, with what they are in A and in B.
        added: Experts of B alone.
        removed: Experts of A alone.
        changed: Experts of both that differ: their fields with what they are in A and in B. ``digest`` among them says
            that it is another adapter.
        gates: Experts of both whose gate rows differ at some linear, with how many linears.
        routers: Experts of both whose router rows differ, or stand in one bank only.
        order: Whether the experts of both come in another order.
    """

    settings: dict[str, tuple[str, str]]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: dict[str, dict[str, tuple[str, str]]]
    gates: dict[str, int]
    routers: tuple[str, ...]
    order: bool

    @property
    def same(self) -> bool:
        """Whether nothing differs but the generation's number."""
        rest = self.settings.keys() - {"generation"}
        return not (rest or self.added or self.removed or self.changed or self.gates or self.routers or self.order)


def diff_banks(a: Bank, b: Bank) -> BankDiff:
    """Compares two opened banks; of the tensors, gates and routers alone are read."""
    entries_a, entries_b = ({entry.name: entry for entry in bank.manifest.experts} for bank in (a, b))
    both = [name for name in a.names if name in entries_b]
    fields = {name: _fields(entries_a[name], entries_b[name]) for name in both}
    return BankDiff(
        settings=dict(_settings(a, b)),
        added=tuple(name for name in b.names if name not in entries_a),
        removed=tuple(name for name in a.names if name not in entries_b),
        changed={name: found for name, found in fields.items() if found},
        gates=_gates(a, b, both),
        routers=_routers(a, b, both),
        order=both != [name for name in b.names if name in entries_a],
    )


def _settings(a: Bank, b: Bank) -> Iterator[tuple[str, tuple[str, str]]]:
    for field in ("base_model", "base_fingerprint", "generation", "routing"):
        before, after = getattr(a.manifest, field), getattr(b.manifest, field)
        if before != after:
            yield field, (str(before), str(after))


def _fields(a: ExpertEntry, b: ExpertEntry) -> dict[str, tuple[str, str]]:
    pairs = {field: (getattr(a, field), getattr(b, field)) for field in ExpertEntry.model_fields}
    return {field: (str(before), str(after)) for field, (before, after) in pairs.items() if before != after}


def _gates(a: Bank, b: Bank, both: list[str]) -> dict[str, int]:
    """How many gates have another row for an expert; a linear that one bank alone has counts where a row is not 0."""
    counts = dict.fromkeys(both, 0)
    for linear in dict.fromkeys((*a.linears, *b.linears)):
        rows = [_rows(bank.gate(linear) if linear in bank.linears else None, bank.names) for bank in (a, b)]
        for name in both:
            counts[name] += not _equal(rows[0].get(name), rows[1].get(name))
    return {name: count for name, count in counts.items() if count}


def _routers(a: Bank, b: Bank, both: list[str]) -> tuple[str, ...]:
    rows = [_rows(bank.routers().transpose(0, 1) if bank.router_header else None, bank.names) for bank in (a, b)]
    return tuple(name for name in both if not _equal(rows[0].get(name), rows[1].get(name)))


def _rows(rows_EH: Tensor | None, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {} if rows_EH is None else dict(zip(names, rows_EH, strict=True))


def _equal(before: Tensor | None, after: Tensor | None) -> bool:
    if before is None or after is None:
        return not any(bool(row.any()) for row in (before, after) if row is not None)
    return before.shape == after.shape and torch.equal(before, after)
