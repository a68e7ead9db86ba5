"""The gate loss by hand, and gates that learn to name their experts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from meteora_dist.bank import Bank
from meteora_dist.moe.inject import inject
from meteora_dist.moe.layer import RoutedGroup
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.training.gate_loss import IGNORE, gate_loss
from meteora_dist.training.local_gates import GateBatch, GateMetrics, LocalFit, fit_gates
from meteora_kernels.routed_lora.stack import LoraPart
from tests.support.tiny import SPECS, linears, load_tiny_llama

EXPERTS = len(SPECS)


def test_zero_gates_lose_ln_e() -> None:
    labels_BL = torch.randint(28, (3, 10), generator=torch.Generator().manual_seed(0))
    loss = gate_loss([torch.zeros(3, 10, 28)] * 7, labels_BL)
    assert float(loss) == pytest.approx(math.log(28))


def test_worked_example() -> None:
    # Two gates, three positions, two experts. Labels 0 0 1, so position 0 must say 0 and position 1 must say 1;
    # position 2 has nothing after it. Gate one says 0 with probability 3/4 everywhere, gate two 1/2.
    sure = torch.tensor([[[math.log(3), 0.0]] * 3])
    loss = gate_loss([sure, torch.zeros(1, 3, 2)], torch.tensor([[0, 0, 1]]))
    first, second = (-math.log(3 / 4) - math.log(1 / 4)) / 2, math.log(2)
    assert float(loss) == pytest.approx((first + second) / 2)


def test_padding_does_not_count() -> None:
    logits_BLE = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1))
    padded = torch.tensor([[2, 2, 2, IGNORE, IGNORE, IGNORE]])
    short = gate_loss([logits_BLE[:, :3]], padded[:, :3])
    assert float(gate_loss([logits_BLE], padded)) == pytest.approx(float(short))


@pytest.fixture
def routed(tiny_base: Path, tiny_bank: Bank) -> RoutedModel:
    routed = inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)
    for group in routed.groups:
        group.state.gates[0].zero_()
    return routed


def parts(group: RoutedGroup) -> list[LoraPart]:
    return [part for expert in group.state.stack.experts for part in expert if part]


def steps(count: int) -> list[list[GateBatch]]:
    """Four tasks, told apart by the bytes they use; half of the sequences run with the gates' own routing."""
    generator = torch.Generator().manual_seed(2)
    plan = []
    for _ in range(count):
        ids_BL = torch.randint(5, (EXPERTS, 12), generator=generator) + 60 * torch.arange(EXPERTS)[:, None]
        mask_BL = torch.ones_like(ids_BL)
        mask_BL[1, 8:] = 0
        plan.append([GateBatch(ids_BL, mask_BL, tuple(range(EXPERTS)), (True, False) * (EXPERTS // 2))])
    return plan


def test_gates_learn_and_nothing_else_changes(routed: RoutedModel) -> None:
    frozen = {name: value.clone() for name, value in routed.model.state_dict().items()}
    experts = [[(part.a_RH.clone(), part.b_RO.clone()) for part in parts(group)] for group in routed.groups]
    seen: list[GateMetrics] = []
    gates = fit_gates(routed, steps(40), LocalFit(learning_rate=2e-2), lambda _, metrics: seen.append(metrics))
    assert seen[0].loss == pytest.approx(math.log(EXPERTS))
    assert seen[-1].loss < 0.5 * seen[0].loss
    assert seen[-1].accuracy > 0.8
    assert list(gates) == linears()
    assert all(torch.equal(value, frozen[name]) for name, value in routed.model.state_dict().items())
    for group, before in zip(routed.groups, experts, strict=True):
        for part, (a_RH, b_RO) in zip(parts(group), before, strict=True):
            assert torch.equal(part.a_RH, a_RH)
            assert torch.equal(part.b_RO, b_RO)


def test_fitting_is_repeatable(routed: RoutedModel) -> None:
    def once() -> dict[str, torch.Tensor]:
        for group in routed.groups:
            group.state.gates[0].zero_()
        return fit_gates(routed, steps(3), LocalFit(), lambda *_: None)

    first, second = once(), once()
    assert all(torch.equal(first[name], second[name]) for name in first)
