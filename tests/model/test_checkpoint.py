"""Weights read slice by slice are those of the file, and a model of them is the one transformers would load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from meteora_dist.errors import ModelError
from meteora_dist.model.checkpoint import stored_tensors
from meteora_dist.model.load import load_base
from tests.support.tiny import write_tiny_llama

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny model of this test alone."""
    return write_tiny_llama(tmp_path / "base")


def test_slices_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    tensors = {
        "matrix": torch.arange(24, dtype=torch.bfloat16).view(4, 6),
        "cube": torch.arange(24.0).view(2, 3, 4),
        "number": torch.tensor(7.0),
        "counts": torch.arange(3),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path, torch.bfloat16)
    assert stored["cube"].get_shape() == [2, 3, 4]
    assert torch.equal(stored["matrix"][...], tensors["matrix"])
    assert torch.equal(stored["matrix"][slice(1, 3), slice(2, 6)], tensors["matrix"][1:3, 2:6])
    assert torch.equal(stored["cube"][slice(1, 2), slice(0, 3), slice(1, 3)], tensors["cube"][1:2, :, 1:3])
    assert torch.equal(stored["number"][...], tensors["number"])
    # Wider than asked for, it stays as it is; narrower, it is widened.
    assert stored["cube"][...].dtype == torch.float32
    assert stored_tensors(tmp_path, torch.float32)["matrix"][...].dtype == torch.float32
    with pytest.raises(ModelError, match="tensor counts is I64; weights must be"):
        stored["counts"][...]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_loaded_as_transformers_loads_it(base: Path, dtype: torch.dtype) -> None:
    ours, theirs = load_base(base, dtype), AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    found, wanted = ours.state_dict(), theirs.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_a_model_that_lacks_weights_or_has_others_is_refused(base: Path) -> None:
    file = base / "model.safetensors"
    tensors = load_file(file)
    whole = dict(tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"do not fit its config: missing_keys .*layers\.1\.mlp\.up_proj"):
        load_base(base, torch.float32)
    save_file({**whole, EMBEDDING: whole[EMBEDDING][:-1].clone()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match=r"do not fit its config: mismatched_keys .*embed_tokens"):
        load_base(base, torch.float32)
    save_file(whole, file, {"format": "pt"})
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match="truncated"):
        load_base(base, torch.float32)
