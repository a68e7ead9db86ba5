"""Which regime serves a stack: a pure function of its size."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from meteora_kernels.routed_lora.dense import routed_lora_dense
from meteora_kernels.routed_lora.grouped import routed_lora_grouped
from meteora_kernels.routed_lora.stack import LoraStack

DENSE_COLUMNS = 512
"""Columns (experts times rank) a linear may have to be served densely; chosen by arithmetic, not yet measured."""

RoutedLora = Callable[[Tensor, LoraStack, Tensor, Tensor], tuple[Tensor, ...]]


def plan(columns: int) -> RoutedLora:
    """The operator for linears with at most ``columns`` packed columns each."""
    return routed_lora_dense if columns <= DENSE_COLUMNS else routed_lora_grouped
