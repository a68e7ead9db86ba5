"""Shapes and parameter counts against transformers' own models, built without memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from meteora_dist.adapters.header import read_header
from meteora_dist.errors import ModelError, PlanError
from meteora_dist.planning.known import KNOWN, shape_of
from meteora_dist.planning.shapes import from_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
VARIANTS = [
    {},
    {"num_key_value_heads": 2, "tie_word_embeddings": True},
    {"head_dim": 16, "attention_bias": True, "mlp_bias": True},
    {"model_type": "mistral", "num_key_value_heads": 2},
    {"model_type": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    {"model_type": "qwen3", "num_key_value_heads": 1},
    {"model_type": "qwen3", "num_key_value_heads": 4, "head_dim": 8, "attention_bias": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_parameters_are_those_transformers_makes(variant: dict[str, Any]) -> None:
    fields = LLAMA | variant
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    assert from_config(fields, "here").parameters() == model.num_parameters()


# As the publishers' checkpoints have them.
PUBLISHED = {
    "SmolLM2-135M": 134_515_008,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}


def test_known_shapes_have_the_published_sizes() -> None:
    assert {name: shape.parameters() for name, shape in KNOWN.items()} == PUBLISHED


@pytest.mark.demo_model
def test_smollm2_is_the_real_checkpoint(demo_model: Path) -> None:
    header = read_header(demo_model / "model.safetensors", ModelError)
    stored = sum(torch.Size(info.shape).numel() for info in header.tensors.values())
    assert KNOWN["SmolLM2-135M"].parameters() == stored
    assert shape_of(str(demo_model)) == KNOWN["SmolLM2-135M"]


def test_two_ranks_hold_halves_and_the_norms_twice() -> None:
    # H 4, 2 heads of 2, MLP 6, V 7, 1 layer. Linears: 4 of 4 x 4, 3 of 4 x 6: 136. Norms: 3 of 4. Tables: 2 of 7 x 4.
    tiny = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 7}
    shape = from_config(LLAMA | tiny, "here")
    assert shape.parameters() == 136 + 12 + 56
    # The first rank's runs of the 7 tokens are 4 long.
    assert shape.parameters(tp=2) == 68 + 12 + 2 * 16


def test_names_and_paths(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert shape_of(str(tmp_path)) == shape_of(str(tmp_path / "config.json")) == from_config(LLAMA, "here")
    assert shape_of("llama-3.1-8b") == KNOWN["Llama-3.1-8B"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None, "vocab_size": None}, "lacks hidden_size, vocab_size"),
        ({"model_type": "qwen3"}, "lacks num_key_value_heads"),
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; this arithmetic knows llama, mistral, qwen2, qwen3"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers is 2.5; it must be a whole number of at least 1"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"mlp_bias": "yes"}, "mlp_bias is 'yes'; it must be true or false"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        from_config(LLAMA | change, "some/config.json")


@pytest.mark.parametrize(("text", "message"), [("[1]", "a JSON list"), ("{", "cannot be read as JSON")])
def test_a_file_that_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(PlanError, match=message):
        shape_of(str(tmp_path))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(PlanError, match=r"GPT-5 is neither .* SmolLM2-135M, Llama-3.1-8B"):
        shape_of("GPT-5")
