"""Live load of the slots: counted by hand on a small pass, and in a whole model."""

from __future__ import annotations

from pathlib import Path

import torch

from meteora_dist.bank import Bank
from meteora_dist.moe.inject import inject
from meteora_dist.moe.load import SlotLoads
from meteora_dist.moe.routing import BASE, RoutingChoice, named, plan_step
from tests.support.tiny import SPECS, load_tiny_llama


def test_counts_by_hand() -> None:
    loads = SlotLoads("abcd")
    # Two tokens, one linear, then one token, two linears; -1 is no expert.
    loads.see(torch.tensor([[[0, 2]], [[2, -1]]]))
    loads.see(torch.tensor([[[2, 1], [2, 3]]]))
    assert set(loads.by_adapter().values()) == {0}, "a pass counts when it has ended"
    loads.settle()
    assert loads.by_adapter() == {"a": 1, "b": 1, "c": 4, "d": 1}
    loads.see(torch.tensor([[[1, 0]]]))
    loads.settle()
    assert loads.by_adapter() == {"a": 2, "b": 2, "c": 4, "d": 1}


def test_a_slot_keeps_its_count_under_another_number() -> None:
    loads = SlotLoads("ab")
    loads.see(torch.tensor([[[0, 1], [1, 1]]]))
    loads.settle()
    loads.renumber("bc")
    assert loads.by_adapter() == {"b": 3, "c": 0}


def test_a_pass_counts_every_token_of_every_linear(tiny_base: Path, tiny_bank: Bank) -> None:
    routed = inject(load_tiny_llama(tiny_base), tiny_bank, torch.float32)
    choices = [RoutingChoice(top_k=2), BASE, named(1)]
    step = plan_step(choices, [3, 4, 5], len(SPECS), 2)
    with torch.no_grad(), routed.context.routed(step):
        routed.model(torch.arange(12)[None], use_cache=False)
    counts = list(routed.loads.values())
    # Three tokens with two experts each, five with one; in every linear.
    assert sum(counts) == (3 * 2 + 5) * routed.newest.num_linears
    assert counts[1] >= 5 * routed.newest.num_linears
