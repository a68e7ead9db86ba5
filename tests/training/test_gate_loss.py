"""The gate loss by hand."""

from __future__ import annotations

import math

import pytest
import torch

from meteora_dist.training.gate_loss import IGNORE, gate_loss


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
