from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from meteora_dist.adapters.peft_config import FOLLOWED, IGNORED, REFUSED, parse_settings
from meteora_dist.errors import AdapterError

PATH = Path("some/adapter_config.json")
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
Q0 = "model.layers.0.self_attn.q_proj"
Q10 = "model.layers.10.self_attn.q_proj"
UP0 = "model.layers.0.mlp.up_proj"


def test_scales_worked_by_hand() -> None:
    assert parse_settings(PATH, PLAIN).scale_of(Q0) == 2.0
    assert parse_settings(PATH, {**PLAIN, "use_rslora": True}).scale_of(Q0) == 4.0
    both = {"rank_pattern": {"q_proj": 16}, "alpha_pattern": {"up_proj": 2}}
    mixed = parse_settings(PATH, {**PLAIN, **both, "use_rslora": True})
    assert (mixed.rank_of(Q0), mixed.scale_of(Q0)) == (16, 8 / math.sqrt(16))
    assert (mixed.rank_of(UP0), mixed.scale_of(UP0)) == (4, 2 / math.sqrt(4))


def test_patterns_match_the_end_of_the_path_at_a_dot_and_the_first_one_counts() -> None:
    ranks = {"proj": 1, "0.self_attn.q_proj": 2, r"layers\.\d\..*": 3, "self_attn.q_proj": 5}
    parsed = parse_settings(PATH, {**PLAIN, "rank_pattern": ranks})
    assert parsed.rank_of(Q0) == 2
    assert parsed.rank_of(Q10) == 5
    assert parsed.rank_of(UP0) == 3
    assert parsed.rank_of("model.layers.10.mlp.up_proj") == 4


def test_every_field_of_the_installed_peft_is_decided_once() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == FOLLOWED | IGNORED | REFUSED.keys()
    assert len(fields) == len(FOLLOWED) + len(IGNORED) + len(REFUSED)


def test_peft_defaults_are_accepted() -> None:
    config = {key: value for key, value in LoraConfig(r=4, lora_alpha=8).to_dict().items() if key != "peft_type"}
    assert parse_settings(PATH, {**config, "peft_type": "LORA"}).rank == 4


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_refuses_what_changes_the_computation_and_names_it(field: str) -> None:
    for off in (None, False, []):
        parse_settings(PATH, {**PLAIN, field: off})
    for on in (True, ["lm_head"], {"some": "thing"}, {}, [[0, 2]]):
        with pytest.raises(AdapterError, match=rf"adapter_config.json: field {field} = .* is not supported"):
            parse_settings(PATH, {**PLAIN, field: on})


INITS = [True, False, "gaussian", "eva", "orthogonal", "mica"]


@pytest.mark.parametrize("init", INITS)
def test_accepts_inits_that_leave_the_base_alone(init: object) -> None:
    parse_settings(PATH, {**PLAIN, "init_lora_weights": init})


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "new", 1, None])
def test_refuses_inits_that_change_the_base(init: object) -> None:
    with pytest.raises(AdapterError, match=r"field init_lora_weights = .* may change the base weights"):
        parse_settings(PATH, {**PLAIN, "init_lora_weights": init})


@pytest.mark.parametrize("value", [True, 1, 0, 0.5, "x", {"a": 1}, [1]])
def test_refuses_unknown_fields_that_are_on(value: object) -> None:
    with pytest.raises(AdapterError, match=r"field use_future = .* is unknown"):
        parse_settings(PATH, {**PLAIN, "use_future": value})


@pytest.mark.parametrize("value", [None, False, [], {}, ""])
def test_passes_over_unknown_fields_that_are_off(value: object) -> None:
    parse_settings(PATH, {**PLAIN, "use_future": value})


def test_ignores_what_describes_the_training() -> None:
    described = {
        **{"lora_dropout": 0.1, "task_type": "CAUSAL_LM", "base_model_name_or_path": "x/y", "revision": "main"},
        **{"target_modules": ".*proj", "inference_mode": True, "auto_mapping": {"a": "b"}, "peft_version": "9"},
        **{"megatron_core": "megatron.core", "qalora_group_size": 16, "layers_to_transform": [0]},
    }
    assert parse_settings(PATH, {**PLAIN, **described}) == parse_settings(PATH, PLAIN)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "field peft_type is 'IA3'; only 'LORA'"),
    ({"peft_type": None}, "field peft_type is None"),
    ({"bias": "all"}, "field bias = 'all' is not supported"),
    ({"bias": "lora_only"}, "field bias = 'lora_only' is not supported"),
    ({"r": 0}, "field r is 0; it must be a whole number of at least 1"),
    ({"r": True}, "field r is True"),
    ({"r": "8"}, "field r is '8'"),
    ({"r": None}, "field r is None"),
    ({"lora_alpha": "8"}, "field lora_alpha is '8'; it must be a number"),
    ({"lora_alpha": None}, "field lora_alpha is None"),
    ({"lora_alpha": 1e300}, "field lora_alpha is 1e\\+300"),
    ({"use_rslora": 1}, "field use_rslora is 1; it must be true or false"),
    ({"rank_pattern": ["q_proj"]}, "field rank_pattern is .* must map"),
    ({"rank_pattern": {"q_proj": 0}}, r"field rank_pattern\['q_proj'\] is 0"),
    ({"alpha_pattern": {"q_proj": "x"}}, r"field alpha_pattern\['q_proj'\] is 'x'"),
    ({"rank_pattern": {"q_(proj": 2}}, "'q_\\(proj' is no regular expression"),
]


@pytest.mark.parametrize(("fields", "reason"), WRONG)
def test_refuses_impossible_values(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(AdapterError, match=reason):
        parse_settings(PATH, {**PLAIN, **fields})
