"""The routing of a pass: small worked examples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from meteora_dist.moe.gate import GroupGates, route
from meteora_dist.moe.roster import roster_of
from meteora_dist.moe.routing import (
    BASE,
    LiveGeneration,
    MixedRouting,
    RoutingChoice,
    StepRouting,
    live_generations,
    named,
    plan_pass,
    plan_step,
    slots_of,
    slots_of_pass,
)

BLEND = RoutingChoice(mode="fixed", experts=((3, 0.7), (0, 0.3)))


def gates(*stacked: Tensor, linears: int = 1) -> GroupGates:
    """Gates of as many generations, each with experts at every linear."""
    return GroupGates(linears, stacked, (None,) * len(stacked))


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
    ids_TNK, weights_TNK = route(torch.ones(5, 1), gates(gate_PH), step)
    assert ids_TNK[:, 0].tolist() == [[1, 0], [1, 0], [-1, -1], [2, -1], [3, 0]]
    expected = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.0, 0.0], [1.0, 0.0], [0.7, 0.3]])
    torch.testing.assert_close(weights_TNK[:, 0], expected)


def test_requests_may_differ_in_top_k_and_temperature() -> None:
    # Logit gap ln 9: at temperature 2 it is ln 3. The second request uses one expert, whatever the others use.
    choices = [RoutingChoice(temperature=2.0), RoutingChoice(top_k=1)]
    step = plan_step(choices, [1, 1], num_experts=3, slots=2)
    gate_PH = torch.tensor([[0.0], [math.log(9)], [-50.0]])
    ids_TNK, weights_TNK = route(torch.ones(2, 1), gates(gate_PH), step)
    assert ids_TNK[:, 0].tolist() == [[1, 0], [1, -1]]
    torch.testing.assert_close(weights_TNK[:, 0], torch.tensor([[0.75, 0.25], [1.0, 0.0]]))


def test_more_slots_than_a_pass_needs_change_nothing() -> None:
    gate_PH = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    x_TH = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    ids, weights = route(x_TH, gates(gate_PH), plan_step([RoutingChoice()], [4], 5, 2))
    wide_ids, wide_weights = route(x_TH, gates(gate_PH), plan_step([RoutingChoice()], [4], 5, 4))
    assert wide_ids[..., :2].tolist() == ids.tolist()
    assert wide_ids[..., 2:].unique().tolist() == [-1]
    torch.testing.assert_close(wide_weights[..., :2], weights)
    assert wide_weights[..., 2:].abs().max() == 0


# Generation 1 has the experts in slots 0, 1, 2; generation 2 has lost the first and got a new one, in slot 3.
LIVE = {1: LiveGeneration(3, (1,)), 2: LiveGeneration(3, (1,), index=1, slot_E=torch.tensor([1, 2, 3]))}
# One input feature of value 1, so that the gates are the logits.
GATES = (torch.tensor([[0.0], [math.log(3)], [-9.0]]), torch.tensor([[-9.0], [0.0], [math.log(3)]]))


def test_live_generations_of_a_roster() -> None:
    live = live_generations(
        roster_of({1: "abc", 2: "bcd"}), {1: (False,) * 3, 2: (False, False, True)}, {1: (1,), 2: (1,)}
    )
    assert list(live) == [1, 2]
    assert live[1] == LIVE[1]
    assert (live[2].num_experts, live[2].index) == (3, 1)
    assert live[2].slot_E is not None
    assert live[2].slot_E.tolist() == [1, 2, 3]
    assert live[2].prototype_E is not None
    assert live[2].prototype_E.tolist() == [False, False, True]


def test_a_prototype_counts_on_both_sides() -> None:
    # Inputs 1 and -1 against the rows ln 3 (trained), -ln 9 (prototype) and 0 (trained).
    live = {1: LiveGeneration(3, (1,), prototype_E=torch.tensor([False, True, False]))}
    step = plan_pass([RoutingChoice()], [2], [1], live, 2)
    stacked = (torch.tensor([[math.log(3)], [-math.log(9)], [0.0]]),)
    ids_TNK, weights_TNK = route(torch.tensor([[1.0], [-1.0]]), gates(*stacked), step)
    # Logits are ln 3, ln 9, 0 for the input 1 and -ln 3, ln 9, 0 for -1.
    assert ids_TNK[:, 0].tolist() == [[1, 0], [1, 2]]
    torch.testing.assert_close(weights_TNK[:, 0], torch.tensor([[0.75, 0.25], [0.9, 0.1]]))


def test_two_generations_in_one_pass() -> None:
    # Packed tokens: generation 1 auto | generation 2 auto, twice | generation 1 named 2 | generation 2 named 2.
    choices = [RoutingChoice(), RoutingChoice(), named(2), named(2)]
    step = plan_pass(choices, [1, 2, 1, 1], [1, 2, 1, 2], LIVE, 2, trace=True)
    assert isinstance(step, MixedRouting)
    slots_TNK, weights_TNK = route(torch.ones(5, 1), gates(*GATES), step)
    assert slots_TNK[:, 0].tolist() == [[1, 0], [3, 2], [3, 2], [2, -1], [3, -1]]
    expected = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.75, 0.25], [1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(weights_TNK[:, 0], expected)
    # Shares stay in the order of the request's own generation.
    shares = [[0.25, 0.75, 0.0], [0.0, 0.25, 0.75], [0.0, 0.25, 0.75], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    for token, wanted in enumerate(shares):
        torch.testing.assert_close(step.shares_of(token), torch.tensor(wanted))
    with pytest.raises(IndexError, match="no token 5"):
        step.shares_of(5)


def test_one_generation_needs_no_mixing() -> None:
    step = plan_pass([RoutingChoice(), named(1)], [2, 1], [1, 1], LIVE, 2)
    assert isinstance(step, StepRouting)
    assert step.slot_E is None
    assert step.shares_of(0) is None
    later = plan_pass([RoutingChoice(), named(1)], [2, 1], [2, 2], LIVE, 2)
    assert isinstance(later, StepRouting)
    slots_TNK, _ = route(torch.ones(3, 1), gates(*GATES), later)
    assert slots_TNK[:, 0].tolist() == [[3, 2], [3, 2], [2, -1]]


def test_a_small_generation_beside_one_that_needs_more_slots() -> None:
    # Five experts beside two; "all experts" means five slots for one request and two for the other.
    live = {4: LiveGeneration(5, (1,)), 5: LiveGeneration(2, (1,), index=1, slot_E=torch.tensor([4, 0]))}
    stacked = (torch.tensor([[5.0], [4.0], [3.0], [2.0], [1.0]]), torch.tensor([[0.0], [math.log(3)]]))
    choices = [RoutingChoice(top_k=9), RoutingChoice(top_k=9)]
    assert slots_of_pass(choices, [4, 5], live) == 5
    assert slots_of_pass(choices, [5, 5], live) == 2
    slots_TNK, weights_TNK = route(torch.ones(2, 1), gates(*stacked), plan_pass(choices, [1, 1], [4, 5], live, 5))
    assert slots_TNK[:, 0].tolist() == [[0, 1, 2, 3, 4], [0, 4, -1, -1, -1]]
    torch.testing.assert_close(weights_TNK[1, 0], torch.tensor([0.75, 0.25, 0.0, 0.0, 0.0]))
    alone = route(torch.ones(1, 1), gates(*stacked), plan_pass(choices[1:], [1], [5], live, 5))
    assert torch.equal(alone[0][0], slots_TNK[1])
    assert torch.equal(alone[1][0], weights_TNK[1])


def test_company_of_another_generation_changes_no_token() -> None:
    generator = torch.Generator().manual_seed(3)
    live = {7: LiveGeneration(6, (1,)), 8: LiveGeneration(5, (1,), index=1, slot_E=torch.tensor([5, 0, 2, 3, 6]))}
    stacked = (torch.randn(12, 4, generator=generator), torch.randn(10, 4, generator=generator))
    x_TH = torch.randn(9, 4, generator=generator)
    choices = [RoutingChoice(temperature=3.0), BLEND, RoutingChoice(top_k=1), BASE, RoutingChoice()]
    lengths, generations = [2, 1, 3, 1, 2], [7, 8, 8, 7, 8]
    mixed = route(x_TH, gates(*stacked, linears=2), plan_pass(choices, lengths, generations, live, 2))
    first = 0
    for choice, length, generation in zip(choices, lengths, generations, strict=True):
        rows = slice(first, first + length)
        alone = route(x_TH[rows], gates(*stacked, linears=2), plan_pass([choice], [length], [generation], live, 2))
        assert torch.equal(mixed[0][rows], alone[0])
        torch.testing.assert_close(mixed[1][rows], alone[1])
        first += length


def test_linears_that_a_generation_does_not_adapt_get_no_expert() -> None:
    # Two linears; generation 2 adapts the second one alone, so its experts can act, and have shares, there alone.
    live = {1: LiveGeneration(2, (2,)), 2: LiveGeneration(2, (1,), index=1)}
    stacked_PH = torch.tensor([[0.0], [math.log(3)], [math.log(3)], [0.0]])
    group = GroupGates(2, (stacked_PH, stacked_PH), (None, torch.tensor([[True], [False]])))
    step = plan_pass([RoutingChoice(), RoutingChoice(), named(1)], [1, 1, 1], [1, 2, 2], live, 2, trace=True)
    slots_TNK, weights_TNK = route(torch.ones(3, 1), group, step)
    assert slots_TNK.tolist() == [[[1, 0], [0, 1]], [[-1, -1], [0, 1]], [[-1, -1], [1, -1]]]
    torch.testing.assert_close(weights_TNK[:, 0], torch.tensor([[0.75, 0.25], [0.0, 0.0], [0.0, 0.0]]))
    for token, shares in enumerate([[1.0, 1.0], [0.75, 0.25], [0.0, 1.0]]):
        torch.testing.assert_close(step.shares_of(token), torch.tensor(shares))
