"""The next generation of a bank: experts added, replaced or removed, everything else as it was.

A bank's folder never changes once it is written. An edit makes another folder beside it, in which the files of
unchanged experts are hard links, so a generation costs the disk its gates and its new experts.

Shapes: E experts, H input features of a linear.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from meteora_dist.adapters import Adapter, read_adapter
from meteora_dist.adapters.tensors import read_tensors
from meteora_dist.bank.bank import Bank, describe
from meteora_dist.bank.gates import GATES_FILE
from meteora_dist.bank.joining import NewExpert, given_rows, new_row, widths_of
from meteora_dist.bank.manifest import ExpertEntry, GateOrigin, check_expert_name
from meteora_dist.bank.routers import ROUTER_ROWS_FILE, ROUTERS_FILE, Routers, read_router_rows
from meteora_dist.bank.write import Draft, check_new, place
from meteora_dist.errors import AdapterError, BankError, ExpertNotFound, InvalidRequest


@dataclass(frozen=True, slots=True)
class BankEdit:
    """A change of a bank. An expert may be named once.

    Attributes:
        add: New experts by name; they come last, in this order.
        replace: Experts that take the place of those of the same name.
        remove: Names of experts that go.
    """

    add: Mapping[str, NewExpert] = field(default_factory=dict)
    replace: Mapping[str, NewExpert] = field(default_factory=dict)
    remove: tuple[str, ...] = ()


def edit_bank(bank: Bank, edit: BankEdit, path: Path) -> Bank:
    """Writes the bank that ``edit`` makes of ``bank``, one generation on, and opens it.

    The rows of unchanged experts stay as they are, bit for bit. In the routers, a new expert without rows of its own
    gets none, and ``auto-sequence`` does not choose it; one that replaces another keeps that one's rows, because they
    know a domain by the base model's hidden states, not the adapter. A bank of which no expert is left with router
    rows has no routers any more.

    Args:
        bank: The bank as it is; its folder is only read.
        edit: What changes.
        path: Where the new one goes; nothing may be there yet.

    Raises:
        ExpertNotFound: ``edit`` replaces or removes an expert the bank lacks.
        InvalidRequest: It adds one the bank has, names one twice, changes nothing, or leaves no expert.
        BankError: ``path`` exists, a name is not allowed, gate rows do not fit, or files cannot be written.
        AdapterError: A new adapter is damaged or asks for something unsupported.
    """
    _check_names(bank, edit)
    check_new(path, edit.add)
    joining = {**edit.replace, **edit.add}
    read = {name: read_adapter(expert.adapter) for name, expert in joining.items()}
    staying = {name: a for name, a in zip(bank.names, bank.adapters, strict=True) if name not in edit.remove}
    experts = {**staying, **read}
    widths = widths_of(experts)
    rows = {name: given_rows(expert, read[name], widths) for name, expert in joining.items()}
    prototypes = {entry.name for entry in bank.manifest.experts if entry.gate == "prototype"} - rows.keys()
    prototypes |= {name for name, given in rows.items() if given is None}
    draft = Draft(
        routers=_routers(bank, experts, joining),
        base_id=bank.manifest.base_model,
        base_fingerprint=bank.manifest.base_fingerprint,
        experts=experts,
        gates=_gates(bank, experts, widths, rows),
        routing=bank.manifest.routing,
        generation=bank.manifest.generation + 1,
        prototypes=frozenset(prototypes & experts.keys()),
        linked=frozenset(experts.keys() - joining.keys()),
    )
    return place(path, draft)


def preview(bank: Bank, name: str, expert: NewExpert) -> tuple[ExpertEntry, Adapter]:
    """What an expert would be if it joined ``bank``, or took the place of the one of its name; nothing is written.

    Raises:
        InvalidRequest: No expert may be called so.
        AdapterError: The adapter is damaged, asks for something unsupported, or is for another base model.
        BankError: Its gate rows are damaged or do not fit.
    """
    try:
        check_expert_name(name)
    except ValueError as cause:
        raise InvalidRequest(str(cause), "name") from None
    adapter = read_adapter(expert.adapter)
    others = {other: a for other, a in zip(bank.names, bank.adapters, strict=True) if other != name}
    _check_base(adapter, others)
    given = given_rows(expert, adapter, widths_of({**others, name: adapter}))
    routers = _routers(bank, [*others, name], {name: expert})
    routable = routers is not None and name not in routers.untrained
    gate: GateOrigin = "prototype" if given is None else "trained"
    return describe(name, adapter, gate, "trained" if routable else "none"), adapter


def _check_base(adapter: Adapter, others: Mapping[str, Adapter]) -> None:
    known = {linear: shape for other in others.values() for linear, shape in other.shapes.items()}
    for linear, shape in adapter.shapes.items():
        other = known.get(linear, shape)
        if (shape.in_features, shape.out_features) != (other.in_features, other.out_features):
            raise AdapterError(
                adapter.path,
                f"maps {shape.in_features} to {shape.out_features} features at {linear}; in the base model of the bank "
                f"it maps {other.in_features} to {other.out_features}",
            )


def _check_names(bank: Bank, edit: BankEdit) -> None:
    named = [*edit.add, *edit.replace, *edit.remove]
    if not named:
        raise InvalidRequest("the edit names no expert: there is nothing to change")
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise InvalidRequest(f"the edit names {', '.join(twice)} more than once")
    if unknown := [name for name in (*edit.replace, *edit.remove) if name not in bank.names]:
        raise ExpertNotFound(f"there is no expert {unknown[0]!r} to change; the bank has {', '.join(bank.names)}")
    if known := [name for name in edit.add if name in bank.names]:
        raise InvalidRequest(f"the bank has an expert {known[0]!r} already; replace it, or choose another name")
    if len(edit.remove) == len(bank.names) and not edit.add:
        raise InvalidRequest("the edit removes every expert; a bank needs at least one")


def _routers(bank: Bank, names: Collection[str], joining: Mapping[str, NewExpert]) -> Routers | None:
    """The routers of the new bank, in the dtype they had; None when none of its experts has rows.

    Args:
        bank: The bank as it was.
        names: Of the new bank's experts, in order.
        joining: Those of them that are new, or replace the one of their name.
    """
    header, settings = bank.router_header, bank.manifest.routers
    if header is None or settings is None:
        return None
    layers = bank.router_layers
    before = read_tensors(bank.path / ROUTERS_FILE, header, layers, BankError)
    router_LEH = torch.stack([router_EH.to(before[0].dtype) for router_EH in before])
    width = router_LEH.shape[-1]
    rows = {e.name: router_LEH[:, i] for i, e in enumerate(bank.manifest.experts) if e.router == "trained"}
    for name, expert in joining.items():
        path = expert.adapter / ROUTER_ROWS_FILE
        if path.exists():
            rows[name] = read_router_rows(path, layers, width).to(router_LEH.dtype)
    untrained = frozenset(name for name in names if name not in rows)
    if len(untrained) == len(names):
        return None
    after_LEH = torch.stack([rows.get(name, torch.zeros_like(router_LEH[:, 0])) for name in names], dim=1)
    return Routers(dict(zip(layers, after_LEH, strict=True)), settings.pooling, untrained)


def _gates(
    bank: Bank,
    experts: Mapping[str, Adapter],
    widths: Mapping[str, int],
    rows: Mapping[str, Mapping[str, Tensor] | None],
) -> dict[str, Tensor]:
    """The gates of the new bank, each in the dtype it had; ``rows`` has an entry for each expert that joins."""
    before = dict(
        zip(bank.linears, read_tensors(bank.path / GATES_FILE, bank.gate_header, bank.linears, BankError), strict=True)
    )
    unchanged = [index for index, name in enumerate(bank.names) if name in experts and name not in rows]
    place_of = {bank.names[index]: place for place, index in enumerate(unchanged)}
    trained_E = torch.tensor([not bank.prototypes[index] for index in unchanged], dtype=torch.bool)
    gates = {}
    for linear, width in widths.items():
        beside_EH = before[linear][unchanged] if linear in before else torch.zeros(len(unchanged), width)
        made = {name: new_row(linear, experts[name], given, beside_EH, trained_E) for name, given in rows.items()}
        gates[linear] = torch.stack(
            [made[name].to(beside_EH.dtype) if name in made else beside_EH[place_of[name]] for name in experts]
        )
    return gates
