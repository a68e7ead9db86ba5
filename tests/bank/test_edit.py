"""A bank's next generation: what changes, what stays byte for byte, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from meteora_dist.adapters import read_adapter
from meteora_dist.bank import Bank, BankEdit, NewExpert, edit_bank
from meteora_dist.bank.prototype import prototype_row
from meteora_dist.errors import AdapterError, BankError, ExpertNotFound, InvalidRequest, MeteoraError
from tests.adapters.builders import WEIGHTS, edit_config, peft_adapter
from tests.bank.conftest import Parts

Q0 = "model.layers.0.self_attn.q_proj"
K1 = "model.layers.1.self_attn.k_proj"
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture
def bank(parts: Parts, tmp_path: Path) -> Bank:
    return parts.write(tmp_path / "bank")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that no bank has."""
    folder = tmp_path_factory.mktemp("fresh") / "adapter"
    peft_adapter(folder, seed=20, r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    return folder


def rows_for(adapter: Path, **changes: Tensor | None) -> dict[str, Tensor]:
    """A row of ones for every linear of the adapter, and ``changes``."""
    rows = {name: torch.ones(shape.in_features) for name, shape in read_adapter(adapter).shapes.items()}
    return {name: row for name, row in {**rows, **changes}.items() if row is not None}


def file_of(rows: Mapping[str, Tensor], path: Path) -> Path:
    save_file(dict(rows), path)
    return path


def inode(bank: Bank, name: str, file: str) -> int:
    return (bank.path / "experts" / name / file).stat().st_ino


def test_added_with_its_own_rows(bank: Bank, fresh: Path, tmp_path: Path) -> None:
    rows = rows_for(fresh, **{Q0: torch.arange(16.0)[None], K1: torch.full((16,), 2.0)})
    edit = BankEdit(add={"new": NewExpert(fresh, file_of(rows, tmp_path / "rows.safetensors"))})
    after = edit_bank(bank, edit, tmp_path / "next")
    assert after.names == ("plain", "few", "upper", "new")
    assert after.manifest.generation == 2
    assert after.manifest.experts[:3] == bank.manifest.experts
    assert after.prototypes == (False,) * 4
    assert after.manifest.routing == bank.manifest.routing
    for linear in after.linears:
        assert torch.equal(after.gate(linear)[:3], bank.gate(linear))
    assert after.gate(Q0)[3].tolist() == list(range(16))
    # A row for a linear the expert does not adapt is kept, and where there is none it is zero.
    assert after.gate(K1)[3].tolist() == [2.0] * 16
    assert after.gate("model.layers.0.mlp.up_proj")[3].abs().max() == 0
    assert after.adapters[3].digest == read_adapter(fresh).digest
    assert Bank.open(tmp_path / "next") == after


def test_rows_beside_the_adapter_are_found(bank: Bank, fresh: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fresh, tmp_path / "with-rows")
    file_of(rows_for(fresh), folder / "gate_rows.safetensors")
    after = edit_bank(bank, BankEdit(add={"new": NewExpert(folder)}), tmp_path / "next")
    assert after.manifest.experts[3].gate == "trained"
    assert after.gate(Q0)[3].tolist() == [1.0] * 16


def test_added_without_rows_gets_prototypes(bank: Bank, fresh: Path, tmp_path: Path) -> None:
    after = edit_bank(bank, BankEdit(add={"new": NewExpert(fresh)}), tmp_path / "next")
    assert json.loads((after.path / "bank.json").read_text())["experts"][3]["gate"] == "prototype"
    assert after.prototypes == (False, False, False, True)
    expected = prototype_row(read_adapter(fresh).load(Q0), bank.gate(Q0), torch.tensor([True] * 3))
    assert torch.equal(after.gate(Q0)[3], expected)
    assert after.gate(Q0)[3].norm() == pytest.approx(float(bank.gate(Q0).norm(dim=1).mean()), rel=1e-5)
    assert after.gate(K1)[3].abs().max() == 0
    # The next one takes its length from the trained rows alone, and the mark stays.
    again = edit_bank(after, BankEdit(add={"newer": NewExpert(fresh)}), tmp_path / "third")
    assert again.prototypes == (False, False, False, True, True)
    assert torch.equal(again.gate(Q0)[4], expected)


def test_replaced_in_its_place(bank: Bank, fresh: Path, tmp_path: Path) -> None:
    after = edit_bank(bank, BankEdit(replace={"few": NewExpert(fresh)}), tmp_path / "next")
    assert after.names == bank.names
    assert after.prototypes == (False, True, False)
    assert after.digests == (bank.digests[0], read_adapter(fresh).digest, bank.digests[2])
    for linear in after.linears:
        assert torch.equal(after.gate(linear)[[0, 2]], bank.gate(linear)[[0, 2]])
    length = bank.gate(Q0)[[0, 2]].norm(dim=1).mean()
    assert after.gate(Q0)[1].norm() == pytest.approx(float(length), rel=1e-5)


def test_removed_with_the_gates_that_only_it_needed(bank: Bank, fresh: Path, tmp_path: Path) -> None:
    after = edit_bank(bank, BankEdit(remove=("plain",)), tmp_path / "next")
    assert after.names == ("few", "upper")
    # In layer 0 only "few" is left, which adapts two linears; "upper" adapts all of layer 1.
    assert [name for name in after.linears if ".0." in name] == [Q0, "model.layers.0.mlp.down_proj"]
    assert len(after.linears) == 9
    for linear in after.linears:
        assert torch.equal(after.gate(linear), bank.gate(linear)[1:])
    # A linear that comes back gets zero rows for those that never had one, and a prototype of length 1.
    back = edit_bank(after, BankEdit(add={"new": NewExpert(fresh)}), tmp_path / "third")
    v0 = "model.layers.0.self_attn.v_proj"
    assert back.gate(v0)[:2].abs().max() == 0
    assert back.gate(v0)[2].norm() == pytest.approx(1.0, abs=1e-5)


def test_all_at_once(bank: Bank, fresh: Path, parts: Parts, tmp_path: Path) -> None:
    edit = BankEdit(
        add={"z": NewExpert(fresh), "a": NewExpert(parts.adapters["few"])},
        replace={"upper": NewExpert(fresh)},
        remove=("plain",),
    )
    after = edit_bank(bank, edit, tmp_path / "next")
    assert after.names == ("few", "upper", "z", "a")
    assert after.digests[1] == after.digests[2]
    assert after.digests[0] == after.digests[3]


def test_unchanged_files_are_shared_and_new_ones_are_not(bank: Bank, fresh: Path, tmp_path: Path) -> None:
    after = edit_bank(bank, BankEdit(add={"new": NewExpert(fresh)}, remove=("few",)), tmp_path / "next")
    for file in FILES:
        for name in ("plain", "upper"):
            assert inode(after, name, file) == inode(bank, name, file)
        assert inode(after, "new", file) != (fresh / file).stat().st_ino
    shutil.rmtree(bank.path)
    assert Bank.open(after.path) == after


def test_files_are_copied_where_links_are_impossible(
    bank: Bank, fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError("this file system has no hard links")

    monkeypatch.setattr(os, "link", no_links)
    after = edit_bank(bank, BankEdit(add={"new": NewExpert(fresh)}), tmp_path / "next")
    for file in FILES:
        source = bank.path / "experts" / "plain" / file
        assert inode(after, "plain", file) != source.stat().st_ino
        assert (after.path / "experts" / "plain" / file).read_bytes() == source.read_bytes()


def test_gates_keep_their_dtype(parts: Parts, fresh: Path, tmp_path: Path) -> None:
    low = {linear: gate.bfloat16() for linear, gate in parts.gates.items()}
    bank = parts._replace(gates=low).write(tmp_path / "bank")
    after = edit_bank(bank, BankEdit(add={"new": NewExpert(fresh)}), tmp_path / "next")
    assert {info.dtype for info in after.gate_header.tensors.values()} == {"BF16"}
    assert torch.equal(after.gate(Q0)[:3], low[Q0].float())


def test_adding_and_removing_again_gives_the_same_bank(bank: Bank, fresh: Path, tmp_path: Path) -> None:
    more = edit_bank(bank, BankEdit(add={"new": NewExpert(fresh)}), tmp_path / "more")
    less = edit_bank(more, BankEdit(remove=("new",)), tmp_path / "less")
    assert less.manifest.generation == 3
    assert less.manifest.model_copy(update={"generation": 1}) == bank.manifest
    assert (less.path / "gates.safetensors").read_bytes() == (bank.path / "gates.safetensors").read_bytes()


def refused(bank: Bank, edit: BankEdit, reason: str, error: type[MeteoraError] = InvalidRequest) -> None:
    """Nothing is left behind, and the bank is as it was."""
    before = sorted(bank.path.parent.iterdir())
    with pytest.raises(error, match=reason):
        edit_bank(bank, edit, bank.path.parent / "next")
    assert sorted(bank.path.parent.iterdir()) == before
    assert Bank.open(bank.path) == bank


def test_refuses_impossible_names(bank: Bank, fresh: Path) -> None:
    new = NewExpert(fresh)
    refused(bank, BankEdit(), r"names no expert")
    refused(bank, BankEdit(add={"few": new}), r"has an expert 'few' already")
    refused(bank, BankEdit(replace={"other": new}), r"no expert 'other' to change; the bank has plain", ExpertNotFound)
    refused(bank, BankEdit(remove=("other",)), r"no expert 'other' to change", ExpertNotFound)
    refused(bank, BankEdit(replace={"few": new}, remove=("few",)), r"names few more than once")
    refused(bank, BankEdit(remove=("plain", "plain")), r"names plain more than once")
    refused(bank, BankEdit(remove=bank.names), r"removes every expert")
    refused(bank, BankEdit(add={"auto": new}), r"'auto' is reserved", BankError)
    refused(bank, BankEdit(add={"../x": new}), r"must be 1 to 64", BankError)


def test_refuses_a_bad_adapter(bank: Bank, fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    dora = shutil.copytree(fresh, elsewhere / "dora")
    edit_config(dora, use_dora=True)
    refused(bank, BankEdit(add={"new": NewExpert(dora)}), r"field use_dora", AdapterError)
    refused(bank, BankEdit(add={"new": NewExpert(elsewhere / "none")}), r"there is no such folder", AdapterError)
    cut = shutil.copytree(fresh, elsewhere / "cut")
    (cut / WEIGHTS).write_bytes((fresh / WEIGHTS).read_bytes()[:-8])
    refused(bank, BankEdit(add={"new": NewExpert(cut)}), r"truncated", AdapterError)


ROW_FAULTS: list[tuple[dict[str, Tensor | None], str]] = [
    ({Q0: None}, rf"has no row for {Q0}, which the adapter in .* adapts"),
    ({"lm_head": torch.ones(16)}, r"has a row for lm_head, which no expert of the bank adapts"),
    ({Q0: torch.ones(24)}, rf"the row of {Q0} is F32 \[24\]; it must be floating-point \[16\] or \[1, 16\]"),
    ({Q0: torch.ones(2, 16)}, rf"the row of {Q0} is F32 \[2, 16\]"),
    ({Q0: torch.ones(16, dtype=torch.long)}, rf"the row of {Q0} is I64 \[16\]"),
    ({Q0: torch.full((16,), float("inf"))}, rf"the row of {Q0} holds NaN or infinity"),
]


@pytest.mark.parametrize(("changes", "reason"), ROW_FAULTS)
def test_refuses_bad_rows(
    bank: Bank, fresh: Path, changes: dict[str, Tensor | None], reason: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.safetensors"
    expert = NewExpert(fresh, file_of(rows_for(fresh, **changes), path))
    refused(bank, BankEdit(add={"new": expert}), reason, BankError)
    path.unlink()
    refused(bank, BankEdit(add={"new": expert}), r"rows.safetensors: there is no such file", BankError)


def test_a_damaged_source_leaves_no_generation_behind(bank: Bank, fresh: Path) -> None:
    weights = bank.path / "experts" / "few" / WEIGHTS
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    before = sorted(bank.path.parent.iterdir())
    with pytest.raises(BankError, match=r"experts/few: the adapter's digest is"):
        edit_bank(bank, BankEdit(add={"new": NewExpert(fresh)}), bank.path.parent / "next")
    assert sorted(bank.path.parent.iterdir()) == before


def test_an_existing_path_is_left_alone(bank: Bank) -> None:
    with pytest.raises(BankError, match="exists already"):
        edit_bank(bank, BankEdit(remove=("few",)), bank.path)


def test_a_mark_that_contradicts_the_gates_is_refused(bank: Bank, fresh: Path, tmp_path: Path) -> None:
    after = edit_bank(bank, BankEdit(add={"new": NewExpert(fresh)}), tmp_path / "next")
    manifest = json.loads((after.path / "bank.json").read_text())
    del manifest["experts"][3]["gate"]
    (after.path / "bank.json").write_text(json.dumps(manifest))
    with pytest.raises(BankError, match=r"its rows of \['new'\] are prototypes; bank.json lists \[\]"):
        Bank.open(after.path)
    manifest["experts"][3]["gate"] = "guess"
    (after.path / "bank.json").write_text(json.dumps(manifest))
    with pytest.raises(BankError, match=r"experts.3.gate: Input should be 'trained' or 'prototype'"):
        Bank.open(after.path)


def test_a_bank_from_before_the_mark_loads(bank: Bank) -> None:
    manifest = json.loads((bank.path / "bank.json").read_text())
    for entry in manifest["experts"]:
        del entry["gate"]
    (bank.path / "bank.json").write_text(json.dumps(manifest))
    assert Bank.open(bank.path) == bank
