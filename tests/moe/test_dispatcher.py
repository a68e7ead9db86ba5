"""Dispatch and combine by hand."""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from meteora_dist.moe.dispatcher import AllToAllDispatcher, targets_of
from meteora_dist.moe.equal_exchange import EqualDispatcher
from meteora_dist.moe.placement import contiguous
from meteora_dist.moe.swap import GroupSwap
from meteora_dist.moe.wire import Wire
from meteora_kernels.routed_lora import plan
from tests.support.ranks import run_ranks


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


def _with_kernels(rank: int) -> list[list[Tensor]]:
    """Both exchanges, each on torch and on kernels: what arrives, and what comes back."""
    group = dist.group.WORLD
    assert group is not None
    g = torch.Generator().manual_seed(rank)
    tokens = 5 - 3 * rank
    x_TH, weights_TNK = torch.randn(tokens, 4, generator=g), torch.rand(tokens, 2, 2, generator=g)
    slots_TNK = torch.randint(-1, 4, (tokens, 2, 2), generator=g)
    weights_TNK = weights_TNK.masked_fill(slots_TNK < 0, 0.0)
    targets_DG = targets_of(contiguous(4, 2), rank)
    answers = []
    for dispatcher in (AllToAllDispatcher(group, Wire()), EqualDispatcher(GroupSwap(group), Wire())):
        dispatcher.expect(5)
        for kernels in (False, True):
            with patch.object(plan, "runs_kernels", lambda _, on=kernels: on):
                sent = dispatcher.dispatch(x_TH, slots_TNK, weights_TNK, targets_DG)
                deltas = (sent.rows_MH * sent.weights_MNK.sum((1, 2))[:, None], sent.rows_MH[:, :3] + rank)
                back = dispatcher.combine(deltas, sent.exchange)
            answers.append([sent.rows_MH, sent.local_ids_MNK, sent.weights_MNK, *back])
    return answers


def test_exchanges_on_kernels_equal_those_on_torch() -> None:
    for exact, exact_kernels, equal, equal_kernels in run_ranks(2, _with_kernels):
        for torch_answer, kernel_answer in ((exact, exact_kernels), (equal, equal_kernels)):
            for expected, actual in zip(torch_answer, kernel_answer, strict=True):
                torch.testing.assert_close(actual, expected)


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
