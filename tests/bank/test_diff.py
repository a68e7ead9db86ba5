"""How two banks differ: by digest, by field, and by single rows."""

from __future__ import annotations

from pathlib import Path

import torch

from meteora_dist.bank import BankEdit, NewExpert, Routers, RoutingDefaults, edit_bank, write_bank
from meteora_dist.bank.diff import diff_banks
from tests.bank.conftest import Parts

Q0 = "model.layers.0.self_attn.q_proj"


def test_a_bank_is_the_same_as_its_copy_and_its_next_generation(parts: Parts, tmp_path: Path) -> None:
    later = write_bank(tmp_path / "b", parts.base, "tiny/llama", parts.adapters, parts.gates, generation=4)
    found = diff_banks(parts.write(tmp_path / "a"), later)
    assert found.same
    assert found.settings == {"generation": ("1", "4")}


def test_experts_come_go_and_change(parts: Parts, tmp_path: Path) -> None:
    before = parts.write(tmp_path / "a")
    folders = parts.adapters
    edit = BankEdit(
        add={"new": NewExpert(folders["upper"])}, replace={"few": NewExpert(folders["plain"])}, remove=("plain",)
    )
    found = diff_banks(before, edit_bank(before, edit, tmp_path / "b"))
    assert not found.same
    assert (found.added, found.removed, found.order) == (("new",), ("plain",), False)
    assert found.changed.keys() == {"few"}
    assert found.changed["few"]["digest"] == (before.digests[1], before.digests[0])
    assert found.changed["few"]["rank"] == ("2", "4")
    assert found.gates.keys() == {"few"}


def test_one_number_of_one_gate_row(parts: Parts, tmp_path: Path) -> None:
    gates = {linear: gate.clone() for linear, gate in parts.gates.items()}
    gates[Q0][2, 0] += 1e-3
    other = Parts(parts.base, parts.adapters, gates)
    found = diff_banks(parts.write(tmp_path / "a"), other.write(tmp_path / "b"))
    assert found.gates == {"upper": 1}
    assert (found.same, found.changed, found.settings) == (False, {}, {})


def test_order_routing_and_routers(parts: Parts, tmp_path: Path) -> None:
    rows_EH = torch.eye(3, 16)
    rows_EH[1] = 0
    routers = Routers({f"model.layers.{layer}": rows_EH for layer in range(2)}, untrained=frozenset({"few"}))
    turned = dict(reversed(parts.adapters.items()))
    gates = {linear: gate.flip(0) for linear, gate in parts.gates.items()}
    routing = RoutingDefaults(top_k=1)
    other = write_bank(tmp_path / "b", parts.base, "tiny/llama", turned, gates, routing, routers=routers)
    found = diff_banks(parts.write(tmp_path / "a"), other)
    assert found.order
    assert found.settings.keys() == {"routing"}
    assert not found.gates
    assert found.routers == ("plain", "upper")
    assert found.changed == {name: {"router": ("none", "trained")} for name in ("plain", "upper")}
