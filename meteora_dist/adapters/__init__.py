"""LoRA adapters in PEFT's format: read, checked, and loaded one linear at a time."""

from meteora_dist.adapters.adapter import (
    Adapter,
    AdapterReader,
    LoraPair,
    LoraShape,
    PairCut,
    PairPlace,
    read_adapter,
)

__all__ = ["Adapter", "AdapterReader", "LoraPair", "LoraShape", "PairCut", "PairPlace", "read_adapter"]
