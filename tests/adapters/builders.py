"""Adapters made by PEFT itself, and files broken on purpose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def tiny_llama() -> LlamaForCausalLM:
    """Two layers, width 16, 4 heads, 2 KV heads, MLP 24: q, k and down all have different shapes."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def peft_adapter(folder: Path, seed: int = 1, **fields: Any) -> PeftModel:
    """Saves a PEFT adapter with random matrices (PEFT starts with B = 0) in ``folder``."""
    model = get_peft_model(tiny_llama(), LoraConfig(task_type="CAUSAL_LM", **fields))
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model


def edit_config(folder: Path, **fields: Any) -> None:
    """Overwrites fields of adapter_config.json."""
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def edit_weights(folder: Path, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Adds or overwrites tensors of the weights file; None removes one."""
    merged = {**load_file(folder / WEIGHTS), **tensors}
    save_file({name: tensor for name, tensor in merged.items() if tensor is not None}, folder / WEIGHTS)
