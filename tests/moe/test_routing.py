"""The routing of a pass: small worked examples."""

from __future__ import annotations

import math

import torch

from meteora_dist.moe.gate import route
from meteora_dist.moe.routing import BASE, RoutingChoice, named, plan_step, slots_of

BLEND = RoutingChoice(mode="fixed", experts=((3, 0.7), (0, 0.3)))


def test_slots_of_a_pass() -> None:
    assert slots_of([], 8) == 0
    assert slots_of([BASE], 8) == 0
    assert slots_of([BASE, named(2)], 8) == 1
    assert slots_of([RoutingChoice(top_k=5), BLEND], 8) == 5
    assert slots_of([RoutingChoice(top_k=5)], 3) == 3


def test_mixed_requests_share_a_pass() -> None:
    # Packed tokens: auto auto | base | named 2 | blend of 3 and 0. Gate logits prefer expert 1, then 0, by ln 3.
    choices = [RoutingChoice(), BASE, named(2), BLEND]
    step = plan_step(choices, [2, 1, 1, 1], num_experts=4, slots=2, trace=True)
    gate_PH = torch.tensor([[0.0], [math.log(3)], [-9.0], [-9.0]])
    ids_TNK, weights_TNK = route(torch.ones(5, 1), gate_PH, 1, step)
    assert ids_TNK[:, 0].tolist() == [[1, 0], [1, 0], [-1, -1], [2, -1], [3, 0]]
    expected = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 0.0], [1.0, 0.0], [0.7, 0.3]])
    torch.testing.assert_close(weights_TNK[:, 0], expected)


def test_requests_may_differ_in_top_k_and_temperature() -> None:
    # Logit gap ln 9: at temperature 2 it is ln 3. The second request uses one expert, whatever the others use.
    choices = [RoutingChoice(temperature=2.0), RoutingChoice(top_k=1)]
    step = plan_step(choices, [1, 1], num_experts=3, slots=2)
    gate_PH = torch.tensor([[0.0], [math.log(9)], [-50.0]])
    ids_TNK, weights_TNK = route(torch.ones(2, 1), gate_PH, 1, step)
    assert ids_TNK[:, 0].tolist() == [[1, 0], [1, -1]]
    torch.testing.assert_close(weights_TNK[:, 0], torch.tensor([[0.75, 0.25], [1.0, 0.0]]))


def test_more_slots_than_a_pass_needs_change_nothing() -> None:
    gate_PH = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    x_TH = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    ids, weights = route(x_TH, gate_PH, 1, plan_step([RoutingChoice()], [4], 5, 2))
    wide_ids, wide_weights = route(x_TH, gate_PH, 1, plan_step([RoutingChoice()], [4], 5, 4))
    assert wide_ids[..., :2].tolist() == ids.tolist()
    assert wide_ids[..., 2:].unique().tolist() == [-1]
    torch.testing.assert_close(wide_weights[..., :2], weights)
    assert wide_weights[..., 2:].abs().max() == 0
