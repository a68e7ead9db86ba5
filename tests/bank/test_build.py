"""A bank of adapters without training: rows that come with them stay, the others get prototypes beside them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from meteora_dist.adapters import read_adapter
from meteora_dist.bank import NewExpert, RoutingDefaults
from meteora_dist.bank.build import build_bank
from meteora_dist.bank.prototype import arrow_direction
from meteora_dist.errors import AdapterError, BankError
from tests.bank.conftest import Parts

Q0 = "model.layers.0.self_attn.q_proj"


def test_without_rows_every_gate_is_the_experts_own_direction(parts: Parts, tmp_path: Path) -> None:
    experts = {name: NewExpert(folder) for name, folder in parts.adapters.items()}
    bank = build_bank(tmp_path / "bank", parts.base, "tiny", experts, RoutingDefaults(top_k=1))
    assert bank.names == tuple(parts.adapters)
    assert bank.prototypes == (True, True, True)
    assert bank.manifest.routing.top_k == 1
    bank.check_base(parts.base)
    for linear in bank.linears:
        for index, row_H in enumerate(bank.gate(linear)):
            pair = bank.pair(linear, index)
            wanted_H = torch.zeros_like(row_H) if pair is None else arrow_direction(pair)
            torch.testing.assert_close(row_H, wanted_H)


def test_rows_beside_an_adapter_stay_and_give_the_others_their_length(parts: Parts, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(parts.adapters["plain"], own)
    rows = {name: torch.full((shape.in_features,), 3.0) for name, shape in read_adapter(own).shapes.items()}
    save_file(rows, own / "gate_rows.safetensors")
    experts = {"own": NewExpert(own), "few": NewExpert(parts.adapters["few"])}
    bank = build_bank(tmp_path / "bank", parts.base, "tiny", experts)
    assert bank.prototypes == (False, True)
    own_H, few_H = bank.gate(Q0)
    assert torch.equal(own_H, torch.full((16,), 3.0))
    torch.testing.assert_close(few_H.norm(), own_H.norm())


def test_nothing_is_left_of_a_bank_that_is_refused(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="there is no such folder"):
        build_bank(tmp_path / "out" / "bank", parts.base, "tiny", {"x": NewExpert(tmp_path / "none")})
    with pytest.raises(BankError, match="reserved"):
        build_bank(tmp_path / "out" / "bank", parts.base, "tiny", {"auto": NewExpert(parts.adapters["plain"])})
    assert not (tmp_path / "out").exists()
