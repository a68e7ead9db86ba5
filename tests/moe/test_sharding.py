"""Oracle 3: loop = grouped = dense = sharded, for uneven, idle and mixed ranks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from meteora_dist.bank import Bank
from meteora_dist.moe.dispatcher import AllToAllDispatcher, targets_of
from meteora_dist.moe.inject import RoutedModel, inject
from meteora_dist.moe.placement import contiguous
from meteora_dist.moe.routing import BASE, RoutingChoice, named, plan_step
from meteora_dist.moe.wire import Wire
from meteora_kernels.routed_lora.dense import routed_lora_dense
from meteora_kernels.routed_lora.grouped import routed_lora_grouped
from meteora_kernels.routed_lora.reference import routed_lora_reference
from meteora_kernels.routed_lora.stack import LoraStack
from tests.support.ranks import run_ranks
from tests.support.tiny import SPECS, VOCABULARY, load_tiny_llama

Operator = Callable[[Tensor, LoraStack, Tensor, Tensor], tuple[Tensor, ...]]
EXPERTS = len(SPECS)
MIXED = [RoutingChoice(), BASE, named(1), RoutingChoice(mode="fixed", experts=((3, 0.6), (1, 0.4)))]
CASES = [(tokens, top_k) for tokens in (1, 8, 64) for top_k in (1, 2, EXPERTS)]


def prompt(tokens: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def build(base: Path, bank: Bank) -> RoutedModel:
    return inject(load_tiny_llama(base), bank, torch.float32)


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
        with patch("meteora_dist.moe.layer.routed_lora", op):
            return forward(build(tiny_base, tiny_bank), prompt(64, 1), MIXED, 2)

    torch.testing.assert_close(answer(operator), answer(routed_lora_reference), rtol=1e-4, atol=1e-4)


def _sharded_cases(rank: int, base: Path, bank_path: Path, world: int) -> list[Tensor]:
    """Every case as rank ``rank`` sees it; in the last two a rank has other tokens than the rest, or none."""
    placement = contiguous(EXPERTS, world)
    group = dist.group.WORLD
    assert group is not None
    bank = Bank.open(bank_path)
    routed = inject(load_tiny_llama(base), bank, torch.float32, placement, rank, AllToAllDispatcher(group, Wire()))
    answers = [forward(routed, prompt(tokens, 2), [RoutingChoice(top_k=k)], k) for tokens, k in CASES]
    answers.append(forward(routed, prompt(64, 3), MIXED, 2))
    answers.append(forward(routed, prompt(4 + 30 * rank, rank), [RoutingChoice()], 2))
    if rank == 0:
        answers.append(forward(routed, prompt(5, 4), [RoutingChoice()], 2))
    else:
        routed.serve(2)
    return answers


@pytest.mark.parametrize("world", [2, 3])
def test_sharded_equals_local(tiny_base: Path, tiny_bank: Bank, world: int) -> None:
    local = build(tiny_base, tiny_bank)
    expected = [forward(local, prompt(tokens, 2), [RoutingChoice(top_k=k)], k) for tokens, k in CASES]
    expected.append(forward(local, prompt(64, 3), MIXED, 2))
    results = run_ranks(world, _sharded_cases, tiny_base, tiny_bank.path, world)
    for rank, answers in enumerate(results):
        own = forward(local, prompt(4 + 30 * rank, rank), [RoutingChoice()], 2)
        idle = [forward(local, prompt(5, 4), [RoutingChoice()], 2)] if rank == 0 else []
        for answer, wanted in zip(answers, [*expected, own, *idle], strict=True):
            torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-4)


def _one_exchange(rank: int) -> tuple[list[list[float]], list[list[list[int]]], list[list[float]]]:
    group = dist.group.WORLD
    assert group is not None
    dispatcher = AllToAllDispatcher(group, Wire())
    x_TH = torch.tensor([[10.0 * rank + 1], [10.0 * rank + 2]])
    ids_TNK = torch.tensor([[[0, 1]], [[3, 0]]]) if rank == 0 else torch.tensor([[[2, -1]], [[-1, -1]]])
    targets_DG = targets_of(contiguous(4, 2), rank)
    sent = dispatcher.dispatch(x_TH, ids_TNK, torch.where(ids_TNK >= 0, 0.5, 0.0), targets_DG)
    weight_M1 = sent.weights_MNK.sum((1, 2))[:, None]
    (combined,) = dispatcher.combine((sent.rows_MH * weight_M1,), sent.exchange)
    return sent.rows_MH.tolist(), sent.local_ids_MNK.tolist(), combined.tolist()


def test_worked_exchange() -> None:
    # Experts 0, 1 live on rank 0 and 2, 3 on rank 1. Rank 0's first token wants 0 and 1: it stays, once, not twice.
    # Its second wants 3 and 0: it goes to both ranks. Rank 1's first token wants 2, and its second nothing at all.
    (rows_0, ids_0, out_0), (rows_1, ids_1, out_1) = run_ranks(2, _one_exchange)
    assert rows_0 == [[1.0], [2.0]]
    assert ids_0 == [[[0, 1]], [[-1, 0]]]
    assert rows_1 == [[2.0], [11.0]]
    assert ids_1 == [[[1, -1]], [[0, -1]]]
    # The "expert" multiplies by the weights that reached it, so a token comes back times its whole weight.
    assert out_0 == [[1.0], [2.0]]
    assert out_1 == [[5.5], [0.0]]
