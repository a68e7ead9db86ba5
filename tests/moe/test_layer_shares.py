"""Shares by layer: worked examples, and the same through every way a pass may take."""

from __future__ import annotations

import math

import pytest
import torch

from meteora_dist.moe.gate import GroupGates, route
from meteora_dist.moe.linears import layer_of
from meteora_dist.moe.routing import BASE, LiveGeneration, RoutingChoice, named, plan_pass

LIVE = {1: LiveGeneration(3, (1, 2)), 2: LiveGeneration(3, (1, 2), index=1, slot_E=torch.tensor([1, 2, 3]))}
# One input feature of value 1, so that the gates are the logits: 0.25, 0.75 and nearly nothing under top-2.
STACKED = (torch.tensor([[0.0], [math.log(3)], [-9.0]]), torch.tensor([[-9.0], [0.0], [math.log(3)]]))


def gates(layer: int) -> GroupGates:
    return GroupGates(1, STACKED, (None, None), layer=layer)


@pytest.mark.parametrize(("linear", "layer"), [("model.layers.12.mlp.up_proj", 12), ("layers.3.x", 3), ("lm_head", 0)])
def test_a_linear_names_its_layer(linear: str, layer: int) -> None:
    assert layer_of(linear) == layer


def test_a_pass_keeps_layers_apart_for_the_last_tokens_of_those_who_ask() -> None:
    # Packed tokens: generation 1 auto | generation 2 auto, twice | generation 1 named 2, silent | generation 2 base.
    choices = [RoutingChoice(), RoutingChoice(), named(2), BASE]
    step = plan_pass(choices, [1, 2, 1, 1], [1, 2, 1, 2], LIVE, 2, trace=True, layered=[0, 1, 3])
    for layer in (0, 1, 1):
        route(torch.ones(5, 1), gates(layer), step)
    torch.testing.assert_close(step.layer_shares_of(0), torch.tensor([[0.25, 0.75, 0.0], [0.5, 1.5, 0.0]]))
    torch.testing.assert_close(step.layer_shares_of(2), torch.tensor([[0.0, 0.25, 0.75], [0.0, 0.5, 1.5]]))
    assert step.layer_shares_of(4).abs().max() == 0
    for token in (0, 2):
        torch.testing.assert_close(step.layer_shares_of(token).sum(0), step.shares_of(token))
    for token in (1, 3):
        with pytest.raises(IndexError, match=f"not asked for token {0 if token == 1 else 1}"):
            step.layer_shares_of(token)


def test_nobody_asked() -> None:
    step = plan_pass([RoutingChoice()], [2], [1], LIVE, 2, trace=True)
    with pytest.raises(IndexError, match="not asked for"):
        step.layer_shares_of(1)
