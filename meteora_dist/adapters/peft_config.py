"""adapter_config.json as PEFT writes it: what of it we follow, what we may ignore, and what we refuse.

Every field of PEFT's LoraConfig is in exactly one of the three tables, so a field that would change the computation
can never be passed over in silence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meteora_dist.errors import AdapterError

FOLLOWED = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"}
)
"""Fields that are read and checked."""

IGNORED = frozenset(
    {
        # They describe the adapter or its training.
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
        *("lora_dropout", "runtime_config", "eva_config"),
        # They say which modules have an adapter; the tensors of the file do so too, and exactly.
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        # They act only together with a refused field or a refused init_lora_weights.
        *("loftq_config", "corda_config", "lora_ga_config", "megatron_core", "qalora_group_size"),
    }
)
"""Fields that change nothing in what a finished adapter computes."""

REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA rescales the base weights",
    "modules_to_save": "it replaces whole modules of the base model",
    "trainable_token_indices": "it replaces rows of the embedding",
    "fan_in_fan_out": "it is for base layers that store transposed weights",
    "lora_bias": "it adds a bias to every linear",
    "target_parameters": "it adapts bare parameters instead of linears",
    "layer_replication": "it changes the layers of the base model",
    "megatron_config": "it needs Megatron's own parallel linears",
    "alora_invocation_tokens": "activated LoRA switches on in the middle of a sequence",
    "use_qalora": "QALoRA pools the inputs of the base layer",
    "use_bdlora": "block-diagonal LoRA stores its matrices differently",
    "arrow_config": "Arrow mixes several adapters by its own router",
    "kasa_config": "KaSA changes the base weights and adds a diagonal",
    "monteclora_config": "MonteCLoRA adds sampled terms to the matrices",
    "velora_config": "VeLoRA stores tensors beside the LoRA matrices",
    "ensure_weight_tying": "it ties adapters of different modules to each other",
}
"""Fields that must be off, and what they would do."""

_INITS = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Initialisations that leave the base weights alone; pissa, olora, corda, loftq and lora_ga change them."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Rank and scale of every module, by PEFT's rules.

    Attributes:
        rank: r, for modules no rank pattern matches.
        alpha: lora_alpha, for modules no alpha pattern matches.
        rslora: Whether the scale is ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
        rank_pattern: Module name or regular expression to rank.
        alpha_pattern: Module name or regular expression to alpha.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Rank of the base-model module path ``module``."""
        return self.rank_pattern.get(_matching(self.rank_pattern, module), self.rank)

    def scale_of(self, module: str) -> float:
        """What the product ``B A`` of ``module`` is multiplied with."""
        alpha = self.alpha_pattern.get(_matching(self.alpha_pattern, module), self.alpha)
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def parse_settings(path: Path, fields: Mapping[str, Any]) -> LoraSettings:
    """Reads the fields of adapter_config.json.

    Args:
        path: The file they are from, for messages.
        fields: Its content.

    Raises:
        AdapterError: When a field asks for something unsupported, is unknown, or has an impossible value.
    """
    peft_type = fields.get("peft_type")
    if peft_type != "LORA":
        raise AdapterError(path, f"field peft_type is {peft_type!r}; only 'LORA' is supported")
    _refuse_unsupported(path, fields)
    rslora = fields.get("use_rslora", False)
    if not isinstance(rslora, bool):
        raise AdapterError(path, f"field use_rslora is {rslora!r}; it must be true or false")
    return LoraSettings(
        rank=_rank(path, "r", fields.get("r")),
        alpha=_alpha(path, "lora_alpha", fields.get("lora_alpha")),
        rslora=rslora,
        rank_pattern={
            key: _rank(path, f"rank_pattern[{key!r}]", v) for key, v in _pattern(path, fields, "rank_pattern")
        },
        alpha_pattern={
            key: _alpha(path, f"alpha_pattern[{key!r}]", v) for key, v in _pattern(path, fields, "alpha_pattern")
        },
    )


def _refuse_unsupported(path: Path, fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        off = value is None or value is False or value == []
        if name in REFUSED and not off:
            raise AdapterError(path, f"field {name} = {_short(value)} is not supported: {REFUSED[name]}")
        # PEFT's conventions: a feature that is off is null, false or empty.
        if name not in FOLLOWED | IGNORED | REFUSED.keys() and not (off or value in ({}, "")):
            raise AdapterError(
                path, f"field {name} = {_short(value)} is unknown; it may change what the adapter computes"
            )
    bias = fields.get("bias", "none")
    if bias != "none":
        raise AdapterError(
            path, f"field bias = {_short(bias)} is not supported: biases are not adapted, only 'none' is"
        )
    init = fields.get("init_lora_weights", True)
    if not (isinstance(init, bool) or (isinstance(init, str) and init.lower() in _INITS)):
        raise AdapterError(
            path,
            f"field init_lora_weights = {_short(init)} is not supported: it may change the base weights; convert the "
            "adapter with PEFT (path_initial_model_for_weight_conversion) first",
        )


def _matching(patterns: Mapping[str, object], module: str) -> str:
    # The first pattern that matches the end of the module's path counts, as in PEFT.
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def _pattern(path: Path, fields: Mapping[str, Any], name: str) -> list[tuple[str, Any]]:
    patterns = fields.get(name) or {}
    if not isinstance(patterns, dict):
        raise AdapterError(path, f"field {name} is {_short(patterns)}; it must map module patterns to numbers")
    for key in patterns:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as cause:
            raise AdapterError(path, f"field {name}: {key!r} is no regular expression ({cause})") from cause
    return list(patterns.items())


def _rank(path: Path, name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise AdapterError(path, f"field {name} is {_short(value)}; it must be a whole number of at least 1")
    return value


def _alpha(path: Path, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e6:
        raise AdapterError(path, f"field {name} is {_short(value)}; it must be a number of at most a million")
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
