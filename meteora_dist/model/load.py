"""Loading a base model from a local folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from meteora_dist.errors import ModelError

Dtype = Literal["float32", "bfloat16"]


def torch_dtype(name: Dtype) -> torch.dtype:
    """The torch type behind a configuration's word."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_base(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model in ``folder``, in evaluation mode, with frozen weights.

    Raises:
        ModelError: There is no model there, it is damaged, or its weights are not safetensors.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(folder, "no config.json here; it must be the folder of a transformers checkpoint")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise ModelError(folder, f"cannot be loaded as a causal language model: {error}") from error
    model.eval()
    model.requires_grad_(False)
    return model
