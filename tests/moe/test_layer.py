"""Routed linears through a whole model: loop = grouped = dense (oracle 3)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from meteora_dist.bank import Bank
from meteora_dist.moe.inject import inject
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routing import BASE, RoutingChoice, named, plan_step
from meteora_kernels.routed_lora.dense import routed_lora_dense
from meteora_kernels.routed_lora.grouped import routed_lora_grouped
from meteora_kernels.routed_lora.reference import routed_lora_reference
from meteora_kernels.routed_lora.stack import LoraStack
from tests.support.tiny import SPECS, VOCABULARY, load_tiny_llama

Operator = Callable[[Tensor, LoraStack, Tensor, Tensor], tuple[Tensor, ...]]
EXPERTS = len(SPECS)
MIXED = [RoutingChoice(), BASE, named(1), RoutingChoice(mode="fixed", experts=((3, 0.6), (1, 0.4)))]


def prompt(tokens: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def forward(routed: RoutedModel, ids_1L: Tensor, choices: list[RoutingChoice], slots: int) -> Tensor:
    share = ids_1L.shape[1] // len(choices)
    step = plan_step(choices, [share] * len(choices), EXPERTS, slots, trace=True)
    with torch.no_grad(), routed.context.routed(step):
        logits = routed.model(ids_1L, use_cache=False).logits
    assert step.shares_TE is not None
    return torch.cat([logits[0], step.shares_TE], dim=-1)


@pytest.mark.parametrize("operator", [routed_lora_dense, routed_lora_grouped])
def test_operators_agree_through_the_whole_model(tiny_base: Path, tiny_bank: Bank, operator: Operator) -> None:
    def answer(op: Operator) -> Tensor:
        with patch("meteora_kernels.routed_lora.plan.routed_lora", op):
            return forward(inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32), prompt(64, 1), MIXED, 2)

    torch.testing.assert_close(answer(operator), answer(routed_lora_reference), rtol=1e-4, atol=1e-4)
