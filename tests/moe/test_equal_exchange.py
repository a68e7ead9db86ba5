"""The exchange of fixed shape: by hand, and that it brings back what the exact one does."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from meteora_dist.moe.dispatcher import AllToAllDispatcher, Dispatched, targets_of
from meteora_dist.moe.equal_exchange import AdaptiveDispatcher, EqualDispatcher
from meteora_dist.moe.placement import Placement, contiguous
from meteora_dist.moe.routing import NO_EXPERT
from meteora_dist.moe.shared_swap import SharedSwap, quickest_swap
from meteora_dist.moe.swap import GroupSwap
from meteora_dist.moe.wire import Wire
from tests.support.ranks import run_ranks

LINEARS, SLOTS, WIDTH = 2, 3, 5
REPLICATED = Placement(owners=((0, 1), (1,), (2,), (0, 2), (1, 2)), groups=3)


@dataclass(frozen=True)
class Case:
    """Tokens of each of three ranks, of which ``expected`` is the most anybody brings; how many experts they choose."""

    tokens: tuple[int, int, int]
    placement: Placement
    dtype: torch.dtype = torch.float32
    holes: float = 0.3


CASES = [
    Case((1, 1, 1), contiguous(5, 3)),
    Case((8, 3, 0), contiguous(5, 3)),
    Case((5, 5, 7), REPLICATED),
    Case((0, 0, 6), REPLICATED, torch.bfloat16),
    Case((4, 2, 4), REPLICATED, holes=1.0),
]


class Answers(NamedTuple):
    """What one case came to on one rank."""

    exact: tuple[Tensor, ...]
    equal: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]
    rows: int
    counts: list[tuple[int, int]]


def expert_of(rank: int, sent: Dispatched) -> tuple[Tensor, ...]:
    """Deltas that tell ranks, experts, linears and weights apart, in the dtype of the rows."""
    factors_MN = torch.where(sent.local_ids_MNK >= 0, sent.weights_MNK * (sent.local_ids_MNK + 2 + 10 * rank), 0).sum(
        -1
    )
    rows_MH = sent.rows_MH.float()
    return tuple((rows_MH * factors_MN[:, n : n + 1] * (n + 1)).to(sent.rows_MH.dtype) for n in range(LINEARS))


def all_ways(rank: int) -> list[Answers]:
    group = dist.group.WORLD
    assert group is not None
    quick = quickest_swap(group, timedelta(seconds=60))
    assert isinstance(quick, SharedSwap)
    wires = [Wire(), Wire()]
    exact = AllToAllDispatcher(group, Wire())
    equals = [EqualDispatcher(swap, wire) for swap, wire in zip((GroupSwap(group), quick), wires, strict=True)]
    answers = []
    for number, case in enumerate(CASES):
        generator = torch.Generator().manual_seed(10 * number + rank)
        shape = (case.tokens[rank], LINEARS, 5)
        slots_TNK = torch.rand(shape, generator=generator).argsort(-1)[..., :SLOTS]
        slots_TNK = slots_TNK.masked_fill(torch.rand(slots_TNK.shape, generator=generator) < case.holes, NO_EXPERT)
        weights_TNK = torch.rand(slots_TNK.shape, generator=generator)
        x_TH = torch.randn(case.tokens[rank], WIDTH, generator=generator).to(case.dtype)
        # What nobody is to compute must not reach anybody: not even as a NaN times a weight of 0.
        x_TH[(slots_TNK < 0).flatten(1).all(-1)] = torch.nan
        targets_DG = targets_of(case.placement, rank)
        found = []
        for dispatcher in (exact, *equals):
            dispatcher.expect(max(case.tokens))
            sent = dispatcher.dispatch(x_TH, slots_TNK, weights_TNK, targets_DG)
            assert not sent.rows_MH.isnan().any()
            assert (sent.weights_MNK[sent.local_ids_MNK < 0] == 0).all()
            found.append(dispatcher.combine(expert_of(rank, sent), sent.exchange))
        counts = [(wire.bytes(kind), wire.rows(kind)) for kind in ("dispatch", "combine") for wire in wires]
        answers.append(Answers(*found, sent.rows_MH.shape[0], counts))
    return answers


@pytest.fixture(scope="module")
def answers() -> list[list[Answers]]:
    return run_ranks(3, all_ways)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_all_exchanges_bring_back_the_same(answers: list[list[Answers]], number: int) -> None:
    case = CASES[number]
    room = {1: 1, 8: 8, 7: 8, 6: 8, 4: 4}[max(case.tokens)]
    for rank, of_rank in enumerate(answers):
        exact, equal, shared, rows, (dispatch, same_dispatch, combine, same_combine) = of_rank[number]
        assert rows == 3 * room
        assert (dispatch, combine) == (same_dispatch, same_combine)
        assert all(map(torch.equal, equal, shared))
        for one, other in zip(exact, equal, strict=True):
            assert one.shape == other.shape == (case.tokens[rank], WIDTH)
            assert other.dtype == case.dtype
            tolerance = 1e-6 if case.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)


def _alone(rank: int) -> tuple[list[int], list[int], str]:
    """A world of one: everything it sends comes back to it, and no number is read by the host."""
    group = dist.group.WORLD
    assert group is not None
    wire = Wire()
    dispatcher = AdaptiveDispatcher(group, GroupSwap(group), wire, few=4)
    targets_DG = targets_of(contiguous(2, 1), 0)
    rows = []

    def exchange(tokens: int) -> Tensor:
        slots_TNK = torch.zeros(tokens, 1, 1, dtype=torch.long)
        sent = dispatcher.dispatch(torch.ones(tokens, 3), slots_TNK, torch.ones(tokens, 1, 1), targets_DG)
        rows.append(sent.rows_MH.shape[0])
        return dispatcher.combine((sent.rows_MH,), sent.exchange)[0]

    def refuse(*_: object) -> None:
        raise AssertionError("the host read a number")

    for tokens, expected in ((3, 3), (2, 4)):
        dispatcher.expect(expected)
        with patch.object(Tensor, "tolist", refuse), patch.object(Tensor, "item", refuse):
            back_TO = exchange(tokens)
        assert torch.equal(back_TO, torch.ones(tokens, 3))
    dispatcher.expect(5)
    assert torch.equal(exchange(5), torch.ones(5, 3))
    dispatcher.expect(2)
    try:
        exchange(3)
    except ValueError as error:
        return rows, [wire.bytes("dispatch"), wire.rows("sizes")], str(error)
    raise AssertionError("three tokens found room for two")


def test_few_tokens_take_fixed_shapes_and_many_do_not() -> None:
    # Up to four tokens there is room for one, two or four; five are exchanged as five.
    ((rows, (sent, sizes), error),) = run_ranks(1, _alone)
    assert rows == [4, 4, 5]
    assert sent == sizes == 0
    assert error == "3 tokens in an exchange that has room for 2"
