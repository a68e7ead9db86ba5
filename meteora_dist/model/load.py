"""Loading a base model from a local folder."""

from __future__ import annotations

from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.utils import GENERATION_CONFIG_NAME

from meteora_dist.errors import ModelError
from meteora_dist.model.checkpoint import stored_tensors

Dtype = Literal["float32", "bfloat16"]


class _TensorParallelOnly(DistributedConfig):
    """A mesh of tp groups, each with a model of its own.

    transformers wraps data-parallel replicas in FSDP, which keeps them equal in training. Here nothing is trained, and
    the wrapper would gather every layer's weights in every pass.
    """

    @property
    def dp_size(self) -> int:
        return 1


def torch_dtype(name: Dtype) -> torch.dtype:
    """The torch type behind a configuration's word."""
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def accelerator() -> torch.device:
    """Where this process computes: its CUDA device when it has one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_base(
    folder: Path, dtype: torch.dtype, ep: int = 1, tp: int = 1, device: torch.device | None = None
) -> PreTrainedModel:
    """The causal language model in ``folder``, in evaluation mode, with frozen weights.

    It goes to ``device``, the accelerator by default.

    With ``tp`` above 1 the process must be one of ``ep * tp`` in the default process group, and every one of them has
    to call: neighbours form a tp group, and each reads only its own slices of the weights.

    Raises:
        ModelError: There is no model there, it is damaged, its weights are not safetensors, or ``tp`` does not divide
            its heads.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(folder, "no config.json here; it must be the folder of a transformers checkpoint")
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if tp > 1:
            _check_heads(folder, config, tp)
            options["distributed_config"] = _TensorParallelOnly(tp_size=tp, dp_replicate_size=ep)
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model: PreTrainedModel
        model, loading = kind.from_pretrained(None, config=config, state_dict=stored_tensors(folder, dtype), **options)
        _check_complete(folder, loading)
        if (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(folder, f"cannot be loaded as a causal language model: {error}") from error
    if tp == 1:
        # The parts of a split model are on their devices already.
        model.to(device or accelerator())  # type: ignore[arg-type]  # transformers' own signature of to() hides torch's
    model.eval()
    model.requires_grad_(False)
    return model


def _check_complete(folder: Path, loading: Mapping[str, Any]) -> None:
    # transformers would warn, and go on with random weights in their place.
    for fault in ("missing_keys", "mismatched_keys", "error_msgs"):
        if loading[fault]:
            raise ModelError(folder, f"its weights do not fit its config: {fault} {sorted(map(str, loading[fault]))}")


def _check_heads(folder: Path, config: PreTrainedConfig, tp: int) -> None:
    heads: int = config.num_attention_heads
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    if heads % tp or kv_heads % tp:
        fitting = [size for size in range(1, kv_heads + 1) if gcd(heads, kv_heads) % size == 0]
        raise ModelError(
            folder,
            f"tp is {tp}, but it must divide the model's {heads} attention heads and {kv_heads} KV heads: "
            f"{', '.join(map(str, fitting))}",
        )
