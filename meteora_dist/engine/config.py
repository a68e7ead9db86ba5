"""What an engine is built from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import PositiveInt, field_validator, model_validator

from meteora_dist.config import StrictModel
from meteora_dist.engine.mesh import Mesh


def expanded(path: Path) -> Path:
    """``path`` with ``~`` and environment variables replaced."""
    return Path(os.path.expandvars(path)).expanduser()


class EngineConfig(StrictModel):
    """The model, its bank, the mesh and the limits of one engine. Paths may hold ``~`` and environment variables.

    Attributes:
        model: Folder of the base model's checkpoint (config, safetensors, tokenizer).
        bank: Folder of the bank.
        ep: Expert-parallel ranks; each owns ``E / ep`` of the experts.
        tp: Tensor-parallel ranks in each expert-parallel group; it must divide the model's attention and KV heads.
        dtype: What weights, activations and KV cache are held in.
        max_model_len: Most tokens of prompt and answer together.
        max_batch_tokens: Most tokens in one forward pass of a rank.
        max_batch_requests: Most requests in one forward pass of a rank.
        kv_cache_tokens: Tokens the paged KV cache of a rank has room for.
        threads: Torch threads of a rank on CPU.
        share_prefixes: Whether a rank keeps the cache of prompts while there is room, and requests of the same routing
            whose prompts begin alike share it, by whole pages.
    """

    model: Path
    bank: Path
    ep: PositiveInt = 1
    tp: PositiveInt = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_model_len: PositiveInt = 2048
    max_batch_tokens: PositiveInt = 512
    max_batch_requests: PositiveInt = 32
    kv_cache_tokens: PositiveInt = 32_768
    threads: PositiveInt = 1
    share_prefixes: bool = False

    @field_validator("model", "bank")
    @classmethod
    def _expand(cls, path: Path) -> Path:
        return expanded(path)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.kv_cache_tokens < self.max_model_len:
            raise ValueError(
                f"kv_cache_tokens is {self.kv_cache_tokens}, but one request may need max_model_len, "
                f"{self.max_model_len}"
            )
        return self

    @property
    def mesh(self) -> Mesh:
        """The ranks' places."""
        return Mesh(self.ep, self.tp)
