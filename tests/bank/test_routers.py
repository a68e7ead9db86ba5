"""Routers in a bank: written, checked, carried through edits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from meteora_dist.bank import Bank, BankEdit, NewExpert, Routers, edit_bank, preview, write_bank
from meteora_dist.bank.gates import rows_metadata
from meteora_dist.bank.routers import ROUTER_ROWS_FILE, ROUTERS_FILE, UNTRAINED
from meteora_dist.errors import BankError
from tests.adapters.builders import peft_adapter
from tests.bank.conftest import Parts

LAYERS = ("model.layers.0", "model.layers.1")
WIDTH = 16


def weights(experts: int = 3, **changes: Tensor | None) -> dict[str, Tensor]:
    """Row e of layer l is filled with 10 l + e + 1; keys of ``changes`` are layer numbers after an ``l``."""
    made: dict[str, Tensor | None] = {
        layer: (10.0 * number + torch.arange(experts)[:, None] + 1).expand(experts, WIDTH).clone()
        for number, layer in enumerate(LAYERS)
    }
    made |= {f"model.layers.{name[1:]}": value for name, value in changes.items()}
    return {layer: value for layer, value in made.items() if value is not None}


def write(parts: Parts, path: Path, routers: Routers) -> Bank:
    return write_bank(path, parts.base, "tiny", parts.adapters, parts.gates, routers=routers)


@pytest.fixture
def bank(parts: Parts, tmp_path: Path) -> Bank:
    return write(parts, tmp_path / "bank", Routers(weights(), "mean"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh") / "adapter"
    peft_adapter(folder, seed=20, r=3, lora_alpha=6, target_modules=["q_proj"])
    return folder


def with_rows(adapter: Path, folder: Path, rows: dict[str, Tensor]) -> NewExpert:
    shutil.copytree(adapter, folder)
    save_file(rows, folder / ROUTER_ROWS_FILE)
    return NewExpert(folder)


def rows_of(bank: Bank) -> list[list[float]]:
    """The first number of every row, by layer."""
    return bank.routers()[..., 0].tolist()


def test_round_trip(bank: Bank) -> None:
    assert bank.router_layers == LAYERS
    assert rows_of(bank) == [[1, 2, 3], [11, 12, 13]]
    assert bank.routers().dtype == torch.float32
    assert bank.manifest.routers is not None
    assert bank.manifest.routers.pooling == "mean"
    assert [entry.router for entry in bank.manifest.experts] == ["trained"] * 3
    assert Bank.open(bank.path) == bank


def test_a_bank_without_routers_has_no_trace_of_them(parts: Parts, tmp_path: Path) -> None:
    bank = parts.write(tmp_path / "bank")
    assert not (bank.path / ROUTERS_FILE).exists()
    assert (bank.router_header, bank.router_layers, bank.manifest.routers) == (None, (), None)
    with pytest.raises(BankError, match="has no routers"):
        bank.routers()
    manifest = json.loads((bank.path / "bank.json").read_text())
    # As older releases wrote it.
    del manifest["routers"], manifest["routing"]["vote"]
    for entry in manifest["experts"]:
        del entry["router"]
    (bank.path / "bank.json").write_text(json.dumps(manifest))
    assert Bank.open(bank.path) == bank


FAULTS: list[tuple[str, dict[str, Tensor | None], str]] = [
    ("missing layer", {"l0": None}, r"has routers for model.layers.1; they must be for the layers 0 to L - 1"),
    ("no layer", {"l0": None, "l1": None}, r"has routers for no layer"),
    ("gap", {"l3": torch.zeros(3, WIDTH)}, r"has routers for model.layers.0, model.layers.1, model.layers.3"),
    ("experts", {"l1": torch.zeros(2, WIDTH)}, r"the router of model.layers.1 is \[2, 16\]; for 3 experts all must be"),
    ("width", {"l1": torch.zeros(3, 8)}, r"the router of model.layers.0 is \[3, 16\]; .* with the same H"),
    ("flat", {"l1": torch.zeros(3)}, r"the router of model.layers.1 is \[3\]"),
    ("dtype", {"l1": torch.zeros(3, WIDTH, dtype=torch.long)}, r"the router of model.layers.1 is torch.int64"),
    ("nan", {"l1": torch.full((3, WIDTH), float("nan"))}, r"the router of model.layers.1 holds NaN or infinity"),
]


@pytest.mark.parametrize(("changes", "reason"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_refuses_to_write(parts: Parts, tmp_path: Path, changes: dict[str, Tensor | None], reason: str) -> None:
    with pytest.raises(BankError, match=reason):
        write(parts, tmp_path / "bank", Routers(weights(**changes)))
    assert list(tmp_path.iterdir()) == []


def test_refuses_routers_nobody_is_trained_for(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(BankError, match="none of its rows is trained"):
        write(parts, tmp_path / "bank", Routers(weights(), untrained=frozenset(parts.adapters)))


def rewrite(bank: Bank, tensors: dict[str, Tensor], names: list[str], untrained: tuple[str, ...] = ()) -> None:
    digests = dict(zip(bank.names, bank.digests, strict=True))
    metadata = rows_metadata({name: digests[name] for name in names}, untrained, UNTRAINED)
    save_file(tensors, bank.path / ROUTERS_FILE, metadata)


def test_refuses_rows_of_others(bank: Bank) -> None:
    tensors = load_file(bank.path / ROUTERS_FILE)
    rewrite(bank, tensors, ["few", "plain", "upper"])
    with pytest.raises(BankError, match=r"its rows belong to the experts \['few', 'plain', 'upper'\]"):
        Bank.open(bank.path)
    rewrite(bank, tensors, list(bank.names), ("few",))
    with pytest.raises(BankError, match=r"its rows of \['few'\] are untrained; bank.json lists \[\]"):
        Bank.open(bank.path)
    save_file(tensors, bank.path / ROUTERS_FILE)
    with pytest.raises(BankError, match="its metadata lacks 'experts', which says whose rows it holds"):
        Bank.open(bank.path)


def test_refuses_damage(bank: Bank) -> None:
    path = bank.path / ROUTERS_FILE
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(BankError, match=r"routers.safetensors: its sha256 is .*; bank.json gives"):
        Bank.open(bank.path)
    path.write_bytes(sound[:-4])
    with pytest.raises(BankError, match="truncated"):
        Bank.open(bank.path)
    path.write_bytes(b"\x80\x04 a pickle that is long enough")
    with pytest.raises(BankError, match="never read"):
        Bank.open(bank.path)
    path.unlink()
    with pytest.raises(BankError, match="there is no such file"):
        Bank.open(bank.path)


def test_file_and_manifest_must_agree(bank: Bank) -> None:
    manifest = json.loads((bank.path / "bank.json").read_text())
    manifest["routers"] = None
    (bank.path / "bank.json").write_text(json.dumps(manifest))
    with pytest.raises(BankError, match=r"routers.safetensors: is there, but bank.json has no routers"):
        Bank.open(bank.path)
    (bank.path / ROUTERS_FILE).unlink()
    with pytest.raises(BankError, match="has experts with router rows, but no routers"):
        Bank.open(bank.path)


def test_an_edit_carries_rows(bank: Bank, fresh: Path, tmp_path: Path) -> None:
    rows = {layer: torch.full((1, WIDTH), 7.0 + number) for number, layer in enumerate(LAYERS)}
    edit = BankEdit(
        add={"bare": NewExpert(fresh), "new": with_rows(fresh, tmp_path / "with-rows", rows)},
        replace={"few": NewExpert(fresh)},
        remove=("plain",),
    )
    after = edit_bank(bank, edit, tmp_path / "next")
    assert after.names == ("few", "upper", "bare", "new")
    # "few" has another adapter and its old rows, "bare" has none.
    assert rows_of(after) == [[2, 3, 0, 7], [12, 13, 0, 8]]
    assert [entry.router for entry in after.manifest.experts] == ["trained", "trained", "none", "trained"]
    assert after.manifest.routers is not None
    assert after.manifest.routers.pooling == "mean"
    # The one that stays without rows keeps the mark, and gets rows by being replaced.
    later = edit_bank(after, BankEdit(replace={"bare": with_rows(fresh, tmp_path / "x", rows)}), tmp_path / "later")
    assert rows_of(later) == [[2, 3, 7, 7], [12, 13, 8, 8]]
    assert [entry.router for entry in later.manifest.experts] == ["trained"] * 4


def test_preview_says_whether_routers_can_choose_it(bank: Bank, fresh: Path, tmp_path: Path) -> None:
    rows = {layer: torch.ones(WIDTH) for layer in LAYERS}
    assert preview(bank, "new", NewExpert(fresh))[0].router == "none"
    assert preview(bank, "few", NewExpert(fresh))[0].router == "trained"
    assert preview(bank, "new", with_rows(fresh, tmp_path / "with-rows", rows))[0].router == "trained"


def test_the_last_rows_take_the_routers_with_them(bank: Bank, fresh: Path, tmp_path: Path) -> None:
    after = edit_bank(bank, BankEdit(add={"bare": NewExpert(fresh)}, remove=bank.names), tmp_path / "next")
    assert after.manifest.routers is None
    assert not (after.path / ROUTERS_FILE).exists()


def test_routers_keep_their_dtype(parts: Parts, fresh: Path, tmp_path: Path) -> None:
    low = {layer: router.bfloat16() for layer, router in weights().items()}
    bank = write(parts, tmp_path / "bank", Routers(low))
    after = edit_bank(bank, BankEdit(add={"new": NewExpert(fresh)}), tmp_path / "next")
    assert after.router_header is not None
    assert {info.dtype for info in after.router_header.tensors.values()} == {"BF16"}


ROW_FAULTS: list[tuple[str, dict[str, Tensor], str]] = [
    ("missing", {LAYERS[0]: torch.ones(WIDTH)}, r"has no row for model.layers.1; the bank has routers for"),
    ("further", dict.fromkeys((*LAYERS, "model.layers.2"), torch.ones(WIDTH)), r"has a row for model.layers.2"),
    ("shape", dict.fromkeys(LAYERS, torch.ones(8)), r"the row of model.layers.0 is F32 \[8\]; it must be"),
    ("dtype", dict.fromkeys(LAYERS, torch.ones(WIDTH, dtype=torch.long)), r"the row of model.layers.0 is I64"),
    ("infinity", dict.fromkeys(LAYERS, torch.full((WIDTH,), float("inf"))), r"holds NaN or infinity"),
]


@pytest.mark.parametrize(("rows", "reason"), [fault[1:] for fault in ROW_FAULTS], ids=[f[0] for f in ROW_FAULTS])
def test_refuses_bad_rows(bank: Bank, fresh: Path, tmp_path: Path, rows: dict[str, Tensor], reason: str) -> None:
    own = {layer: row.clone() for layer, row in rows.items()}
    expert = with_rows(fresh, tmp_path / "with-rows", own)
    with pytest.raises(BankError, match=reason):
        edit_bank(bank, BankEdit(add={"new": expert}), tmp_path / "next")
    assert not (tmp_path / "next").exists()
