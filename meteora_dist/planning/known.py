"""Shapes of models that people name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from meteora_dist.errors import PlanError
from meteora_dist.planning.shapes import ModelShape, from_config

KNOWN: Mapping[str, ModelShape] = MappingProxyType(
    {
        "SmolLM2-135M": ModelShape(576, 1536, 30, 9, 3, 64, 49152, tied=True),
        "Llama-3.1-8B": ModelShape(4096, 14336, 32, 32, 8, 128, 128256),
        "Llama-3.1-70B": ModelShape(8192, 28672, 80, 64, 8, 128, 128256),
        "Qwen2.5-7B": ModelShape(3584, 18944, 28, 28, 4, 128, 152064, qkv_bias=True),
        "Qwen2.5-14B": ModelShape(5120, 13824, 48, 40, 8, 128, 152064, qkv_bias=True),
        "Qwen2.5-32B": ModelShape(5120, 27648, 64, 40, 8, 128, 152064, qkv_bias=True),
        "Qwen3-8B": ModelShape(4096, 12288, 36, 32, 8, 128, 151936, qk_norm=True),
        "Qwen3-14B": ModelShape(5120, 17408, 40, 40, 8, 128, 151936, qk_norm=True),
        "Qwen3-32B": ModelShape(5120, 25600, 64, 64, 8, 128, 151936, qk_norm=True),
    }
)


def shape_of(model: str) -> ModelShape:
    """The shape of a known model by name, or of the config.json at (or in the folder) ``model``.

    Raises:
        PlanError: It is neither, or the file is not the config of a dense Llama-like model.
    """
    by_name = {name.lower(): shape for name, shape in KNOWN.items()}
    if model.lower() in by_name:
        return by_name[model.lower()]
    path = Path(model).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise PlanError(f"{model} is neither a config.json, nor a folder with one, nor one of {', '.join(KNOWN)}")
    try:
        fields = json.loads(file.read_bytes())
    except (OSError, ValueError) as cause:
        raise PlanError(f"{file}: cannot be read as JSON ({cause})") from cause
    if not isinstance(fields, dict):
        raise PlanError(f"{file}: holds a JSON {type(fields).__name__}; it must be an object")
    return from_config(fields, str(file))
