"""Oracle 1: the gates forced to one expert, K = 1, equal PEFT with that adapter; likewise the named mode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from meteora_dist.bank import Bank
from meteora_dist.moe import gate
from meteora_dist.moe.inject import inject
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routing import RoutingChoice, named, plan_step
from tests.support.tiny import SPECS, VOCABULARY, load_tiny_llama

IDS_BL = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def routed(tiny_base: Path, tiny_bank: Bank) -> RoutedModel:
    return inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)


def logits(routed: RoutedModel, choice: RoutingChoice, slots: int) -> Tensor:
    step = plan_step([choice] * 2, [9, 9], routed.num_experts, slots) if slots else None
    with torch.no_grad(), routed.context.routed(step):
        return routed.model(IDS_BL, use_cache=False).logits


def peft_logits(base: Path, bank: Bank, name: str) -> Tensor:
    model = PeftModel.from_pretrained(load_tiny_llama(base), bank.path / "experts" / name)
    with torch.no_grad():
        return model(IDS_BL, use_cache=False).logits


@pytest.mark.parametrize("expert", range(len(SPECS)))
def test_named_expert_equals_peft(routed: RoutedModel, tiny_base: Path, tiny_bank: Bank, expert: int) -> None:
    expected = peft_logits(tiny_base, tiny_bank, tiny_bank.names[expert])
    torch.testing.assert_close(logits(routed, named(expert), 1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("expert", range(len(SPECS)))
def test_one_hot_gate_equals_peft(
    routed: RoutedModel, tiny_base: Path, tiny_bank: Bank, expert: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_hot(x_TH: Tensor, gate_PH: Tensor, num_linears: int) -> Tensor:
        logits_TNE = torch.zeros(x_TH.shape[0], num_linears, routed.num_experts)
        logits_TNE[..., expert] = 1.0
        return logits_TNE

    monkeypatch.setattr(gate, "gate_logits", one_hot)
    expected = peft_logits(tiny_base, tiny_bank, tiny_bank.names[expert])
    torch.testing.assert_close(logits(routed, RoutingChoice(top_k=1), 1), expected, rtol=1e-4, atol=1e-4)


def test_experts_differ_from_each_other_and_from_the_base(routed: RoutedModel) -> None:
    answers = [logits(routed, named(expert), 1) for expert in range(len(SPECS))] + [logits(routed, named(0), 0)]
    for i, first in enumerate(answers):
        for second in answers[:i]:
            assert (first - second).abs().max() > 0.1


def test_base_equals_the_plain_model(routed: RoutedModel, tiny_base: Path) -> None:
    with torch.no_grad():
        expected = load_tiny_llama(tiny_base)(IDS_BL, use_cache=False).logits
    torch.testing.assert_close(logits(routed, RoutingChoice(mode="base"), 0), expected, rtol=0, atol=0)
    # Inside a pass where others use experts, base tokens still get none.
    torch.testing.assert_close(logits(routed, RoutingChoice(mode="base"), 2), expected, rtol=1e-6, atol=1e-6)


def test_blend_is_the_weighted_sum_at_one_linear(routed: RoutedModel) -> None:
    group = routed.groups[0]
    x_TH = torch.randn(3, 32, generator=torch.Generator().manual_seed(8))

    def delta(choice: RoutingChoice, slots: int) -> Tensor:
        with routed.context.routed(plan_step([choice], [3], routed.num_experts, slots)):
            deltas = group(x_TH)
        assert deltas is not None
        return torch.cat(deltas, -1)

    blend = RoutingChoice(mode="fixed", experts=((2, 0.7), (0, 0.3)))
    torch.testing.assert_close(delta(blend, 2), 0.7 * delta(named(2), 1) + 0.3 * delta(named(0), 1))
