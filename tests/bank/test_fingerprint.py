from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meteora_dist.bank import fingerprint
from meteora_dist.errors import ModelError
from tests.bank.conftest import Parts


@pytest.fixture
def model(parts: Parts, tmp_path: Path) -> Path:
    return Path(shutil.copytree(parts.base, tmp_path / "model"))


def shard(model: Path) -> None:
    """Splits model.safetensors in two, as large checkpoints are."""
    tensors = load_file(model / "model.safetensors")
    weight_map = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(tensors)}
    for part in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == part}, model / part)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_same_for_copies_and_shards(parts: Parts, model: Path) -> None:
    own = fingerprint(parts.base)
    assert fingerprint(model) == own
    shard(model)
    assert fingerprint(model) == own


def test_descriptions_in_the_config_do_not_matter(parts: Parts, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    moved = {**config, "rope_theta": theta, "transformers_version": "4.0", "_name_or_path": "x"}
    (model / "config.json").write_text(json.dumps(moved))
    assert fingerprint(model) == fingerprint(parts.base)


NUMBERS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "vocab_size": 33,
    "model_type": "x",
    "rope_parameters": {},
}


@pytest.mark.parametrize("field", NUMBERS)
def test_differs_by_the_architecture(parts: Parts, model: Path, field: str) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, field: NUMBERS[field]}))
    assert fingerprint(model) != fingerprint(parts.base)


def test_differs_by_dtype_names_and_values(parts: Parts, model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    changed = tensors[name].clone()
    changed[0, 0] += 1
    seen = {fingerprint(parts.base)}
    for variant in (
        {**tensors, name: tensors[name].half()},
        {**tensors, name: changed},
        {**tensors, name: tensors[name].T.contiguous()},
        {**tensors, "more": torch.zeros(1)},
        {key: tensor for key, tensor in tensors.items() if key != name},
    ):
        save_file(variant, model / "model.safetensors")
        seen.add(fingerprint(model))
    assert len(seen) == 6


def test_damaged_models_are_refused(model: Path) -> None:
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(ModelError, match=r"model.safetensors: truncated"):
        fingerprint(model)
    (model / "model.safetensors").write_bytes(content)
    shard(model)
    (model / "part-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"part-1.safetensors: there is no such file"):
        fingerprint(model)
    for index, reason in ({"weight_map": {"a": "../x"}}, r"names the shard '../x'"), ({}, r"lacks the map weight_map"):
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=reason):
            fingerprint(model)
    (model / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config.json: there is no such file"):
        fingerprint(model)
