"""The measurement of gate training, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from meteora_dist.bench.gate_training import WAYS, GateTrainingPlan, measure_gate_training


def test_every_way_is_measured_against_the_loop(tiny_base: Path) -> None:
    plan = GateTrainingPlan(tiny_base, experts=3, rank=2, length=8, repeats=2, dtype=torch.float32)
    advanced: list[None] = []
    rows = measure_gate_training(plan, lambda: advanced.append(None))
    assert [row.way for row in rows] == list(WAYS)
    assert len(advanced) == plan.rounds
    assert rows[0].of_loop == 1.0
    for row in rows:
        assert row.of_loop == pytest.approx(row.tokens_per_s / rows[0].tokens_per_s)
