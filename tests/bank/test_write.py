from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from meteora_dist.bank import RoutingDefaults, write_bank
from meteora_dist.errors import AdapterError, BankError, MeteoraError, ModelError
from tests.adapters.builders import edit_config, edit_weights
from tests.bank.conftest import Parts, random_gates

K0 = "model.layers.0.self_attn.k_proj"


def refused(parts: Parts, path: Path, reason: str, error: type[MeteoraError] = BankError) -> None:
    """Nothing is left behind, not even a hidden folder."""
    before = sorted(path.parent.iterdir())
    with pytest.raises(error, match=reason):
        parts.write(path)
    assert sorted(path.parent.iterdir()) == before


def test_keeps_the_routing_defaults_and_the_generation(parts: Parts, tmp_path: Path) -> None:
    routing = RoutingDefaults(top_k=1, temperature=15.0)
    bank = write_bank(tmp_path / "deep" / "bank", parts.base, "tiny", parts.adapters, parts.gates, routing, 7)
    assert bank.manifest.routing == routing
    assert bank.manifest.generation == 7


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "0", "x" * 64])
def test_names_allowed(parts: Parts, tmp_path: Path, name: str) -> None:
    adapters = {name: parts.adapters["few"]}
    assert parts._replace(adapters=adapters, gates=random_gates(adapters)).write(tmp_path / "bank").names == (name,)


NAMES = ["", "x" * 65, ".a", "-a", "a/b", "..", "a b", "a\n", "é", "auto", "auto-sequence", "base"]


@pytest.mark.parametrize("name", NAMES)
def test_names_refused(parts: Parts, tmp_path: Path, name: str) -> None:
    wrong = parts._replace(adapters={name: parts.adapters["few"]})
    refused(wrong, tmp_path / "bank", r"expert name .* (must be 1 to 64|is reserved)")


def test_an_existing_path_is_left_alone(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "bank").mkdir()
    refused(parts, tmp_path / "bank", r"exists already")


def test_a_place_that_cannot_be_written(parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BankError, match=r"cannot be written"):
        parts.write(tmp_path / "file" / "bank")


GATE_FAULTS: list[tuple[dict[str, Tensor], str]] = [
    ({K0: torch.zeros(2, 16)}, rf"the gate of {K0} is \[2, 16\]; .* must be \[3, 16\]"),
    ({K0: torch.full((3, 16), float("nan"))}, rf"the gate of {K0} holds NaN or infinity"),
    ({K0: torch.zeros(3, 16, dtype=torch.long)}, rf"the gate of {K0} is torch.int64"),
    ({"lm_head": torch.zeros(3, 16)}, r"has a gate for lm_head, which no expert adapts"),
]


@pytest.mark.parametrize(("changes", "reason"), GATE_FAULTS)
def test_gates_that_do_not_fit(parts: Parts, tmp_path: Path, changes: dict[str, Tensor], reason: str) -> None:
    refused(parts._replace(gates={**parts.gates, **changes}), tmp_path / "bank", reason)


def test_a_missing_gate(parts: Parts, tmp_path: Path) -> None:
    gates = {linear: gate for linear, gate in parts.gates.items() if "k_proj" not in linear}
    refused(parts._replace(gates=gates), tmp_path / "bank", rf"has no gate for {K0} \(2 of 14 linears lack one\)")


def test_no_experts_no_name_no_generation(parts: Parts, tmp_path: Path) -> None:
    refused(parts._replace(adapters={}), tmp_path / "bank", r"at least one expert")
    for base_id, generation in (("", 1), ("tiny", 0)):
        with pytest.raises(BankError, match=r"at least one expert, a generation of at least 1 and the base"):
            write_bank(tmp_path / "bank", parts.base, base_id, parts.adapters, parts.gates, None, generation)


def test_experts_for_different_base_models(parts: Parts, tmp_path: Path) -> None:
    shutil.copytree(parts.adapters["few"], tmp_path / "wide")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    edit_weights(tmp_path / "wide", {name: torch.zeros(20, 2)})
    wrong = parts._replace(adapters={**parts.adapters, "few": tmp_path / "wide"})
    reason = r"expert plain maps 16 to 16 features at model.layers.0.self_attn.q_proj, expert few 16 to 20; they must"
    refused(wrong, tmp_path / "bank", reason)


def test_a_bad_adapter_or_base(parts: Parts, tmp_path: Path) -> None:
    shutil.copytree(parts.adapters["few"], tmp_path / "dora")
    edit_config(tmp_path / "dora", use_dora=True)
    wrong = parts._replace(adapters={**parts.adapters, "few": tmp_path / "dora"})
    refused(wrong, tmp_path / "bank", r"field use_dora", AdapterError)
    refused(
        parts._replace(base=tmp_path / "none"), tmp_path / "bank", r"config.json: there is no such file", ModelError
    )


def test_an_open_bank_is_frozen(parts: Parts, tmp_path: Path) -> None:
    bank = parts.write(tmp_path / "bank")
    with pytest.raises(dataclasses.FrozenInstanceError):
        bank.path = tmp_path  # type: ignore[misc]
