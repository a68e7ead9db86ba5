"""Whether adapters are for a base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from meteora_dist.adapters import Adapter
from meteora_dist.errors import AdapterError, ModelError


def check_adapters(base: Path, adapters: Mapping[str, Adapter]) -> None:
    """Checks that every adapter is for linears that the base model has, by its config alone.

    Raises:
        AdapterError: One is for another base model.
        ModelError: There is no base model, or an unknown one.
    """
    try:
        config = AutoConfig.from_pretrained(base, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(base, f"cannot be read as a causal language model: {error}") from error
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, adapter in adapters.items():
        for linear, shape in adapter.shapes.items():
            if linear not in linears:
                raise AdapterError(adapter.path, f"expert {name} adapts {linear}, which the base model {base} lacks")
            features = linears[linear].in_features, linears[linear].out_features
            if features != (shape.in_features, shape.out_features):
                raise AdapterError(
                    adapter.path,
                    f"expert {name} maps {shape.in_features} to {shape.out_features} features at {linear}; the base "
                    f"model {base} maps {features[0]} to {features[1]}",
                )
