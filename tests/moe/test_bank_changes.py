"""Oracle 9: a bank that was written, read, made smaller and made whole again gives the same answers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from meteora_dist.bank import Bank, write_bank
from meteora_dist.moe.inject import inject
from meteora_dist.moe.routing import RoutingChoice, named, plan_step, slots_of
from tests.support.tiny import VOCABULARY, load_tiny_llama

IDS_1L = torch.randint(VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(6))


def rewrite(bank: Bank, base: Path, folder: Path, names: tuple[str, ...]) -> Bank:
    """The bank with these experts of ``bank``, in this order."""
    rows = torch.tensor([bank.names.index(name) for name in names])
    gates = {linear: bank.gate(linear)[rows] for linear in bank.linears}
    return write_bank(folder, base, "tiny-llama", {name: bank.path / "experts" / name for name in names}, gates)


def answers(bank: Bank, base: Path, names: tuple[str, ...], auto: bool) -> list[Tensor]:
    routed = inject(load_tiny_llama(base), bank, torch.float32)
    choices = [named(bank.names.index(name)) for name in names] + [RoutingChoice()] * auto
    logits = []
    for choice in choices:
        step = plan_step([choice], [IDS_1L.shape[1]], routed.num_experts, slots_of([choice], routed.num_experts))
        with torch.no_grad(), routed.context.routed(step):
            logits.append(routed.model(IDS_1L, use_cache=False).logits)
    return logits


def test_removing_and_adding_again_leaves_the_others_alone(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    first, second, third, fourth = tiny_bank.names
    smaller = rewrite(tiny_bank, tiny_base, tmp_path / "smaller", (first, third, fourth))
    whole_again = rewrite(tiny_bank, tiny_base, tmp_path / "whole", (first, third, fourth, second))
    before = answers(tiny_bank, tiny_base, (first, third, fourth), auto=False)
    for reduced, wanted in zip(answers(smaller, tiny_base, (first, third, fourth), auto=False), before, strict=True):
        torch.testing.assert_close(reduced, wanted, rtol=1e-4, atol=1e-4)
    restored = answers(whole_again, tiny_base, tiny_bank.names, auto=True)
    for again, wanted in zip(restored, answers(tiny_bank, tiny_base, tiny_bank.names, auto=True), strict=True):
        torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-4)
