from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from meteora_dist.adapters import read_adapter
from meteora_dist.bank import Bank, write_bank
from meteora_dist.bank.gates import model_order, rows_metadata
from meteora_dist.errors import AdapterError, BankError, MeteoraError
from tests.adapters.builders import CONFIG, WEIGHTS, edit_config, peft_adapter
from tests.bank.conftest import Parts, random_gates

Q0 = "model.layers.0.self_attn.q_proj"
K0 = "model.layers.0.self_attn.k_proj"
UP1 = "model.layers.1.mlp.up_proj"


@pytest.fixture
def bank(parts: Parts, tmp_path: Path) -> Bank:
    return parts.write(tmp_path / "bank")


def pairs(bank: Bank, name: str) -> dict[str, tuple[Tensor, Tensor, float] | None]:
    loaded = {linear: bank.pair(linear, bank.names.index(name), dtype=None) for linear in bank.linears}
    return {linear: pair and (pair.a_RH, pair.b_OR, pair.scale) for linear, pair in loaded.items()}


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_round_trip_keeps_every_tensor_and_byte(parts: Parts, bank: Bank) -> None:
    assert bank.names == ("plain", "few", "upper")
    assert set(bank.linears) == set(parts.gates)
    for linear in bank.linears:
        assert torch.equal(bank.gate(linear), parts.gates[linear])
    for name, folder in parts.adapters.items():
        for file in (CONFIG, WEIGHTS):
            assert (bank.path / "experts" / name / file).read_bytes() == (folder / file).read_bytes()
        adapter = read_adapter(folder)
        for linear, pair in pairs(bank, name).items():
            if linear in adapter.shapes:
                expected = adapter.load(linear, dtype=None)
                assert pair is not None
                assert torch.equal(pair[0], expected.a_RH)
                assert torch.equal(pair[1], expected.b_OR)
                assert pair[2] == expected.scale
            else:
                assert pair is None


def test_manifest_says_what_is_inside(parts: Parts, bank: Bank) -> None:
    manifest = json.loads((bank.path / "bank.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["base_model"] == "tiny/llama"
    assert manifest["routing"] == {"mode": "auto", "top_k": 2, "temperature": 1.0, "vote": "majority"}
    assert manifest["routers"] is None
    assert manifest["generation"] == 1
    few = manifest["experts"][1]
    assert few == {
        **{"name": "few", "rank": 2, "alpha": 3.0, "rslora": True, "targets": ["down_proj", "q_proj"]},
        **{"gate": "trained", "router": "none"},
        "digest": read_adapter(parts.adapters["few"]).digest,
    }


def test_writing_twice_gives_the_same_bytes(parts: Parts, bank: Bank, tmp_path: Path) -> None:
    again = parts.write(tmp_path / "again")
    for file in ("bank.json", "gates.safetensors"):
        assert (again.path / file).read_bytes() == (bank.path / file).read_bytes()


def test_files_are_readable_like_any_other(bank: Bank, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    for file in bank.path.rglob("*.*"):
        assert file.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "other"]


def test_linears_are_in_model_order() -> None:
    shuffled = [
        *("model.layers.10.self_attn.q_proj", "model.layers.2.mlp.down_proj", "model.layers.2.self_attn.k_proj"),
        *("model.layers.2.mlp.gate_proj", "model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.o_proj"),
    ]
    in_layer_2 = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert model_order(shuffled) == (*(f"model.layers.2.{name}" for name in in_layer_2), shuffled[0])


def test_an_open_bank_travels_to_another_process(bank: Bank) -> None:
    copy = pickle.loads(pickle.dumps(bank))
    assert copy == bank
    assert torch.equal(copy.gate(Q0), bank.gate(Q0))


def test_gates_of_low_precision_come_back_as_fp32(parts: Parts, tmp_path: Path) -> None:
    low = {linear: gate.bfloat16() for linear, gate in parts.gates.items()}
    bank = write_bank(tmp_path / "bank", parts.base, "tiny", parts.adapters, low)
    assert torch.equal(bank.gate(Q0), low[Q0].float())
    assert bank.gate(Q0).dtype == torch.float32


def test_removing_and_adding_an_expert_leaves_the_others_unchanged(parts: Parts, bank: Bank, tmp_path: Path) -> None:
    kept = [0, 2]
    fewer = {name: path for name, path in parts.adapters.items() if name != "few"}
    # Every linear of the removed expert is adapted by another one, so no gate falls away.
    less = write_bank(tmp_path / "less", parts.base, "t", fewer, {n: g[kept] for n, g in parts.gates.items()}, None, 2)
    added = {**fewer, "few": parts.adapters["few"]}
    gates = {n: torch.cat([less.gate(n), bank.gate(n)[1:2]]) for n in less.linears}
    back = write_bank(tmp_path / "back", parts.base, "t", added, gates, None, 3)
    assert back.manifest.generation == 3
    for name in bank.names:
        assert_same(pairs(back, name), pairs(bank, name))
    for name in fewer:
        assert_same(pairs(less, name), pairs(bank, name))
        for linear in bank.linears:
            row = bank.gate(linear)[bank.names.index(name)]
            assert torch.equal(less.gate(linear)[less.names.index(name)], row)
            assert torch.equal(back.gate(linear)[back.names.index(name)], row)


def test_one_experts_matrices_are_read_without_the_others(bank: Bank) -> None:
    before = pairs(bank, "few")
    for other in ("plain", "upper"):
        shutil.rmtree(bank.path / "experts" / other)
    assert_same(pairs(bank, "few"), before)


def test_asking_for_what_is_not_there(bank: Bank) -> None:
    for call in (lambda: bank.gate("model.norm"), lambda: bank.pair("model.norm", 0)):
        with pytest.raises(BankError, match=r"no expert adapts the linear 'model.norm'"):
            call()
    with pytest.raises(IndexError):
        bank.pair(Q0, 3)


def test_opening_eight_experts_is_quick(parts: Parts, tmp_path: Path) -> None:
    adapters = {}
    for number in range(8):
        adapters[f"e{number}"] = tmp_path / f"e{number}"
        peft_adapter(tmp_path / f"e{number}", seed=number, r=4, target_modules="all-linear")
    write_bank(tmp_path / "bank", parts.base, "t", adapters, random_gates(adapters))
    started = time.perf_counter()
    Bank.open(tmp_path / "bank")
    assert time.perf_counter() - started < 1.0


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / "bank.json").read_text())
    change(manifest)
    (path / "bank.json").write_text(json.dumps(manifest))


def refused(path: Path, reason: str, error: type[MeteoraError] = BankError) -> None:
    with pytest.raises(error, match=reason):
        Bank.open(path)


MANIFEST_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda m: m.update(schema_version=2), r"schema_version is 2; this release reads 1"),
    "no version": (lambda m: m.pop("schema_version"), r"schema_version is None"),
    "unknown field": (lambda m: m.update(extra=1), r"extra: Extra inputs are not permitted"),
    "missing field": (lambda m: m.pop("generation"), r"generation: Field required"),
    "text for number": (lambda m: m.update(generation="1"), r"generation: Input should be a valid integer"),
    "generation": (lambda m: m.update(generation=0), r"generation: Input should be greater than 0"),
    "no experts": (lambda m: m.update(experts=[]), r"experts: Tuple should have at least 1 item"),
    "digest": (lambda m: m.update(gate_digest="abc"), r"gate_digest: String should match pattern"),
    "mode": (lambda m: m["routing"].update(mode="magic"), r"routing.mode: Input should be 'auto' or 'base'"),
    "top_k": (lambda m: m["routing"].update(top_k=0), r"routing.top_k: Input should be greater than 0"),
    "temperature": (
        lambda m: m["routing"].update(temperature=0),
        r"routing.temperature: Input should be greater than 0",
    ),
    "reserved": (lambda m: m["experts"][0].update(name="auto"), r"experts.0.name: .*'auto' is reserved"),
    "path": (lambda m: m["experts"][0].update(name="../x"), r"experts.0.name: .*'../x' must be 1 to 64 letters"),
    "twice": (lambda m: m["experts"][1].update(name="plain"), r"names must be unique; plain occur more than once"),
    "rank": (lambda m: m["experts"][0].update(rank=3), r"expert plain rank 3; its adapter has 4"),
    "alpha": (lambda m: m["experts"][1].update(alpha=9), r"expert few alpha 9.0; its adapter has 3.0"),
    "rslora": (lambda m: m["experts"][1].update(rslora=False), r"expert few rslora False; its adapter has True"),
    "targets": (lambda m: m["experts"][1].update(targets=["q_proj"]), r"expert few targets \('q_proj',\); its adapter"),
    "folder": (lambda m: m["experts"][1].update(name="other"), r"experts/other: there is no such folder"),
    "swapped": (
        lambda m: m["experts"].reverse(),
        r"rows belong to the experts \['plain', 'few', 'upper'\]; bank.json ",
    ),
    "dropped": (lambda m: m["experts"].pop(), r"rows belong to the experts \['plain', 'few', 'upper'\]; bank.json "),
    "gate digest": (lambda m: m.update(gate_digest="0" * 64), r"its sha256 is [0-9a-f]{64}; bank.json gives .* 0{64}"),
}


@pytest.mark.parametrize("fault", MANIFEST_FAULTS)
def test_refuses_a_wrong_manifest(bank: Bank, fault: str) -> None:
    change, reason = MANIFEST_FAULTS[fault]
    edit_manifest(bank.path, change)
    refused(bank.path, reason, AdapterError if fault == "folder" else BankError)


def test_refuses_a_manifest_that_is_no_json(bank: Bank) -> None:
    (bank.path / "bank.json").write_text("{")
    refused(bank.path, r"bank.json: the file is not valid JSON")
    (bank.path / "bank.json").unlink()
    refused(bank.path, r"bank.json: there is no such file")
    refused(bank.path / "none", r"there is no such folder")


def test_refuses_swapped_and_edited_adapters(parts: Parts, bank: Bank) -> None:
    experts = bank.path / "experts"
    (experts / "few").rename(experts / "x")
    (experts / "plain").rename(experts / "few")
    (experts / "x").rename(experts / "plain")
    refused(bank.path, r"experts/plain: .*\(it is the adapter bank.json lists as few\); bank.json gives plain ")
    shutil.rmtree(experts)
    shutil.copytree(parts.adapters["plain"].parent, experts)
    Bank.open(bank.path)
    edit_config(experts / "upper", lora_alpha=9)
    refused(bank.path, r"experts/upper: the adapter's digest is [0-9a-f]{64}; bank.json gives upper [0-9a-f]{64}")
    edit_config(experts / "upper", use_dora=True)
    refused(bank.path, r"experts/upper/adapter_config.json: field use_dora = True", AdapterError)
    (experts / "plain" / WEIGHTS).write_bytes((parts.adapters["plain"] / WEIGHTS).read_bytes()[:1000])
    refused(bank.path, r"experts/plain/adapter_model.safetensors: truncated", AdapterError)


def test_refuses_gates_of_another_bank(parts: Parts, bank: Bank, tmp_path: Path) -> None:
    gates = bank.path / "gates.safetensors"
    same_experts = write_bank(tmp_path / "b", parts.base, "t", parts.adapters, random_gates(parts.adapters, seed=9))
    shutil.copy(same_experts.path / "gates.safetensors", gates)
    refused(bank.path, r"gates.safetensors: its sha256 is .*; bank.json gives gate_digest")
    turned = {name: parts.adapters[name] for name in ("few", "plain", "upper")}
    shutil.copy(write_bank(tmp_path / "c", parts.base, "t", turned, parts.gates).path / "gates.safetensors", gates)
    refused(
        bank.path,
        r"rows belong to the experts \['few', 'plain', 'upper'\]; bank.json lists \['plain', 'few', 'upper'\]",
    )
    peft_adapter(tmp_path / "new", seed=7, r=4, lora_alpha=8, target_modules="all-linear")
    renewed = {**parts.adapters, "plain": tmp_path / "new"}
    shutil.copy(write_bank(tmp_path / "d", parts.base, "t", renewed, parts.gates).path / "gates.safetensors", gates)
    refused(bank.path, r"made for other adapters under the same names")
    gates.write_bytes(gates.read_bytes()[:-1])
    refused(bank.path, r"gates.safetensors: truncated")


def rewrite_gates(bank: Bank, **changes: Tensor | None) -> None:
    path = bank.path / "gates.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    merged = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in merged.items() if tensor is not None}, path, metadata)


GATE_FAULTS: list[tuple[dict[str, Tensor | None], str]] = [
    ({K0: None}, rf"has no gate for {K0} \(1 of 14 linears"),
    ({"lm_head": torch.zeros(3, 16)}, r"has a gate for lm_head, which no expert adapts"),
    ({K0: torch.zeros(2, 16)}, rf"the gate of {K0} is \[2, 16\]; .* must be \[3, 16\]"),
    ({K0: torch.zeros(3, 24)}, rf"the gate of {K0} is \[3, 24\]; .* must be \[3, 16\]"),
    ({K0: torch.zeros(3, 16, 1)}, rf"the gate of {K0} is \[3, 16, 1\]"),
    ({K0: torch.zeros(3, 16, dtype=torch.int8)}, rf"the gate of {K0} is I8"),
]


@pytest.mark.parametrize(("changes", "reason"), GATE_FAULTS)
def test_refuses_gates_that_do_not_fit(bank: Bank, changes: dict[str, Tensor | None], reason: str) -> None:
    rewrite_gates(bank, **changes)
    refused(bank.path, reason)


@pytest.mark.parametrize("metadata", [None, {"experts": "no json"}, {"experts": "[]"}, {"experts": '"\ud800"'}])
def test_refuses_gates_that_do_not_say_whose_they_are(bank: Bank, metadata: dict[str, str] | None) -> None:
    path = bank.path / "gates.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = {**json.loads(content[8 : 8 + length]), "__metadata__": metadata or {}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    refused(bank.path, r"metadata (lacks 'experts'|'experts' is)")


def test_the_row_digest_depends_on_order_and_adapters() -> None:
    assert rows_metadata({"a": "1", "b": "2"}) != rows_metadata({"b": "2", "a": "1"})
    assert rows_metadata({"a": "1", "b": "2"}) != rows_metadata({"a": "2", "b": "1"})


def test_refuses_another_base_model(parts: Parts, bank: Bank, tmp_path: Path) -> None:
    bank.check_base(parts.base)
    shutil.copytree(parts.base, tmp_path / "other")
    config = json.loads((parts.base / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8}))
    own = bank.manifest.base_fingerprint
    with pytest.raises(BankError, match=rf"tiny/llama with fingerprint {own}; .*other has fingerprint [0-9a-f]{{64}}"):
        bank.check_base(tmp_path / "other")
