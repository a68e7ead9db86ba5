from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from meteora_dist.adapters import AdapterReader, LoraShape, PairCut, PairPlace, read_adapter
from meteora_dist.errors import AdapterError
from tests.adapters.builders import CONFIG, WEIGHTS, edit_config, edit_weights, peft_adapter

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q0 = "model.layers.0.self_attn.q_proj"
A_Q0 = f"base_model.model.{Q0}.lora_A.weight"
B_Q0 = f"base_model.model.{Q0}.lora_B.weight"

SHAPES_OF_PEFT: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "odd alpha": {"r": 3, "lora_alpha": 7, "target_modules": "all-linear"},
    "rslora": {"r": 8, "lora_alpha": 4, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "one layer": {"r": 2, "lora_alpha": 2, "target_modules": r"model\.layers\.1\.(self_attn|mlp)\.[qkg].*_proj"},
    "patterns": {
        **{"r": 4, "lora_alpha": 8, "target_modules": ALL, "use_rslora": True},
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6, "model.layers.0.self_attn.v_proj": 1},
        "alpha_pattern": {"^model.layers.0.mlp.down_proj": 32, "self_attn.o_proj": 3, "nothing_matches": 5},
    },
    "dropout": {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"], "lora_dropout": 0.3},
    "orthogonal": {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"], "init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("case", SHAPES_OF_PEFT)
def test_deltas_equal_pefts_own(tmp_path: Path, case: str) -> None:
    model = peft_adapter(tmp_path, **SHAPES_OF_PEFT[case])
    adapter = read_adapter(tmp_path)
    adapted = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    assert set(adapter.shapes) == set(adapted)
    for name, module in adapted.items():
        pair = adapter.load(name)
        shape = adapter.shapes[name]
        assert pair.a_RH.shape == (shape.rank, shape.in_features)
        assert pair.b_OR.shape == (shape.out_features, shape.rank)
        assert pair.scale == shape.scale == module.scaling["default"]
        torch.testing.assert_close(pair.scale * (pair.b_OR @ pair.a_RH), module.get_delta_weight("default"))


def test_reads_what_config_and_file_say(tmp_path: Path) -> None:
    peft_adapter(tmp_path, r=4, lora_alpha=8, use_rslora=True, target_modules=["k_proj"])
    adapter = read_adapter(tmp_path)
    assert (adapter.path, adapter.rank, adapter.alpha, adapter.rslora) == (tmp_path, 4, 8, True)
    expected = LoraShape(rank=4, in_features=16, out_features=8, scale=8 / math.sqrt(4), dtype=torch.float32)
    assert adapter.shapes == {f"model.layers.{layer}.self_attn.k_proj": expected for layer in (0, 1)}


def test_loads_in_the_dtype_asked_for(tmp_path: Path) -> None:
    peft_adapter(tmp_path, r=4, target_modules=["q_proj"])
    edit_weights(tmp_path, {A_Q0: torch.full((4, 16), 0.1, dtype=torch.float16)})
    adapter = read_adapter(tmp_path)
    assert adapter.load(Q0).a_RH.dtype == torch.float32
    assert adapter.load(Q0, dtype=torch.bfloat16).b_OR.dtype == torch.bfloat16
    assert adapter.shapes[Q0].dtype == torch.float32
    kept = adapter.load(Q0, dtype=None)
    assert (kept.a_RH.dtype, kept.b_OR.dtype) == (torch.float16, torch.float32)


def test_digest_follows_content_not_whitespace(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    peft_adapter(first, r=4, target_modules=["q_proj"])
    shutil.copytree(first, second)
    edit_config(second)
    assert (first / CONFIG).read_bytes() != (second / CONFIG).read_bytes()
    digest = read_adapter(first).digest
    assert read_adapter(second).digest == digest
    edit_config(second, lora_alpha=9)
    assert read_adapter(second).digest != digest
    edit_config(second, lora_alpha=8)
    assert read_adapter(second).digest == digest
    content = bytearray((second / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (second / WEIGHTS).write_bytes(content)
    assert read_adapter(second).digest != digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    peft_adapter(tmp_path, r=4, target_modules=["q_proj"])
    return tmp_path


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        read_adapter(folder)


MISFITS: list[tuple[dict[str, Tensor | None], str]] = [
    ({B_Q0: None}, f"has lora_A but no lora_B for '{Q0}'"),
    ({A_Q0: None}, f"has lora_B but no lora_A for '{Q0}'"),
    ({A_Q0: torch.zeros(8, 16), B_Q0: torch.zeros(16, 8)}, f"lora_A of {Q0} has rank 8; .* gives it rank 4"),
    ({B_Q0: torch.zeros(16, 8)}, f"lora_B of {Q0} has rank 8; .* gives it rank 4"),
    ({A_Q0: torch.zeros(4, 16, dtype=torch.int32)}, f"lora_A of {Q0} is I32; it must be F32"),
    ({A_Q0: torch.zeros(4, 16).to(torch.float8_e4m3fn)}, f"lora_A of {Q0} is F8_E4M3"),
    ({A_Q0: torch.zeros(4, 16, 1, 1)}, r"is \[4, 16, 1, 1\]; it must be a matrix"),
    ({A_Q0: torch.zeros(4, 0)}, r"is \[4, 0\]; it must be a matrix with no size zero"),
    ({f"base_model.model.{Q0}.lora_B.bias": torch.zeros(16)}, rf"no place for: 'base_model.model.{Q0}.lora_B.bias'"),
    ({f"base_model.model.{Q0}.lora_magnitude_vector": torch.zeros(16)}, "lora_magnitude_vector'"),
    ({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 32)}, "embed_tokens.lora_embedding_A'"),
    ({"base_model.model.lm_head.weight": torch.zeros(32, 16)}, "no place for: 'base_model.model.lm_head.weight'"),
    ({f"{Q0}.lora_A.weight": torch.zeros(4, 16)}, f"no place for: '{Q0}.lora_A.weight'"),
    ({"base_model.model.lora_A.weight": torch.zeros(4, 16)}, "no place for: 'base_model.model.lora_A.weight'"),
    ({f"z{number}": torch.zeros(1) for number in range(10)}, "'z0', .*'z7' and 2 more"),
]


@pytest.mark.parametrize(("tensors", "reason"), MISFITS)
def test_every_tensor_is_used_or_named(folder: Path, tensors: dict[str, Tensor | None], reason: str) -> None:
    edit_weights(folder, tensors)
    refused(folder, reason)


def test_refuses_what_peft_saves_beyond_plain_lora(tmp_path: Path) -> None:
    for number, fields in enumerate([{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}]):
        peft_adapter(tmp_path / str(number), r=4, target_modules=["q_proj"], **fields)
        refused(tmp_path / str(number), rf"field {next(iter(fields))} = .* is not supported")


def test_refuses_adapted_embeddings_and_saved_base_weights(tmp_path: Path) -> None:
    for target, tensor in (("embed_tokens", "lora_embedding_A"), ("lm_head", "base_layer.weight")):
        peft_adapter(tmp_path / target, r=4, target_modules=[target, "q_proj"])
        refused(tmp_path / target, f"no place for: .*{target}.{tensor}'")


def test_refuses_an_empty_file(folder: Path) -> None:
    edit_weights(folder, {A_Q0: None, B_Q0: None, **{name.replace(".0.", ".1."): None for name in (A_Q0, B_Q0)}})
    refused(folder, "holds no tensors")


def test_refuses_missing_files(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", "there is no such folder")
    (folder / WEIGHTS).unlink()
    refused(folder, f"{WEIGHTS}: there is no such file")
    torch.save({"a": torch.zeros(1)}, folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin, a pickle, which is never read")
    (folder / "adapter_model.bin").rename(folder / WEIGHTS)
    refused(folder, "a PyTorch archive")
    (folder / CONFIG).unlink()
    refused(folder, f"{CONFIG}: there is no such file")


def test_refuses_a_truncated_file_and_a_damaged_config(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-100])
    refused(folder, "truncated")
    (folder / WEIGHTS).write_bytes(content)
    (folder / CONFIG).write_text('{"peft_type": "LORA", "r": 4')
    refused(folder, f"{CONFIG}: the file is not valid JSON")


def test_a_file_that_changed_after_it_was_read_is_refused(folder: Path) -> None:
    adapter = read_adapter(folder)
    with pytest.raises(AdapterError, match=r"does not adapt the module 'model.norm'"):
        adapter.load("model.norm")
    content = (folder / WEIGHTS).read_bytes()
    edit_weights(folder, {A_Q0: torch.zeros(4, 8)})
    with pytest.raises(AdapterError, match=r"has changed since it was checked"):
        adapter.load(Q0)
    (folder / WEIGHTS).write_bytes(content[:-4])
    with pytest.raises(AdapterError, match=r"ends inside tensor 'base_model.*; it was longer when it was checked"):
        adapter.load(Q0.replace(".0.", ".1."))
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=r"cannot be read any more \(No such file"):
        adapter.load(Q0)


@pytest.mark.parametrize("scratch", [1, 100, 2**20])
def test_parts_are_read_to_where_they_belong(tmp_path: Path, scratch: int) -> None:
    peft_adapter(tmp_path, r=4, lora_alpha=8, target_modules=ALL)
    adapter = read_adapter(tmp_path)
    cut = PairCut(slice(2, 9), slice(3, 8), slice(1, 4), slice(0, 2))
    # Rows of a larger matrix each, as in a stack of packed experts; what is around them must stay.
    packed = {module: (torch.full((5, 7), torch.nan), torch.full((4, 5), torch.nan)) for module in adapter.shapes}
    with patch("meteora_dist.adapters.tensors.SCRATCH_BYTES", scratch):
        adapter.read_into(PairPlace(module, cut, a[1:4], b[1:3]) for module, (a, b) in packed.items())
    for module, (a, b) in packed.items():
        whole = adapter.load(module)
        assert torch.equal(a[1:4], whole.a_RH[1:4, 2:9])
        assert torch.equal(b[1:3], whole.b_OR[3:8, 0:2].T)
        assert int(a.isnan().sum()) == 2 * 7
        assert int(b.isnan().sum()) == 2 * 5


def test_adapters_alike_share_what_is_known_of_them(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("first", "second", "scaled")]
    for seed, folder in enumerate(folders):
        peft_adapter(folder, r=4, lora_alpha=8, target_modules=ALL)
        edit_weights(folder, {A_Q0: torch.full((4, 16), float(seed))})
    edit_config(folders[2], lora_alpha=16)
    reader = AdapterReader()
    first, second, scaled = map(reader.read, folders)
    assert first.header is second.header is scaled.header
    assert first.shapes is second.shapes
    assert scaled.shapes[Q0].scale == 2 * first.shapes[Q0].scale
    assert [adapter.digest for adapter in (first, second, scaled)] == [read_adapter(f).digest for f in folders]
    # A header that is known does not vouch for a file of another length.
    content = (folders[1] / WEIGHTS).read_bytes()
    (folders[1] / WEIGHTS).write_bytes(content[:-2])
    with pytest.raises(AdapterError, match="truncated"):
        reader.read(folders[1])
