"""Adapters in PEFT's format, written: one with other matrices, and one that does nothing.

Shapes: R rank, H input features, O output features.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from meteora_dist.adapters.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, pair_names
from meteora_dist.adapters.tensors import torch_dtype


def write_changed(adapter: Adapter, folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Path:
    """Writes an adapter with the config of another one and matrices of the same shapes and dtypes.

    Args:
        adapter: The other one.
        folder: Where it goes; may be there.
        pairs: a_RH and b_OR of every linear of ``adapter``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(adapter.path / CONFIG_FILE, folder / CONFIG_FILE)
    tensors = {}
    for module in adapter.shapes:
        for name, matrix in zip(pair_names(module), pairs[module], strict=True):
            info = adapter.header.tensors[name]
            assert tuple(matrix.shape) == info.shape, f"{name} must keep its shape {info.shape}"
            tensors[name] = matrix.to(torch_dtype(info.dtype)).contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    return folder


def write_null(folder: Path, module: str, in_features: int, out_features: int) -> Path:
    """Writes an adapter whose delta is 0: rank 1, zeros, at one linear.

    Args:
        folder: Where it goes; may be there.
        module: Path of the linear in the base model.
        in_features: H.
        out_features: O.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": [module]}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    name_a, name_b = pair_names(module)
    tensors = {name_a: torch.zeros(1, in_features), name_b: torch.zeros(out_features, 1)}
    save_file(tensors, folder / WEIGHTS_FILE, {"format": "pt"})
    return folder
