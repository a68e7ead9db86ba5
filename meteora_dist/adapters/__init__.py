"""LoRA adapters in PEFT's format: read, checked, and loaded one linear at a time."""

from meteora_dist.adapters.adapter import Adapter, LoraPair, LoraShape, PairCut, read_adapter

__all__ = ["Adapter", "LoraPair", "LoraShape", "PairCut", "read_adapter"]
