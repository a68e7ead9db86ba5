"""Placement of slots on expert-parallel groups: small worked examples, then properties."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from meteora_dist.moe.dispatcher import AllToAllDispatcher, targets_of
from meteora_dist.moe.placement import Placement, contiguous
from meteora_dist.moe.wire import Wire
from tests.support.ranks import run_ranks

# Slot 0 lives on groups 0 and 2, slot 1 on group 1, slot 2 on all but group 0.
REPLICATED = Placement(owners=((0, 2), (1,), (1, 2, 3)), groups=4)


def test_local_ids_follow_the_slots_of_a_group() -> None:
    assert [REPLICATED.slots_of(group) for group in range(4)] == [(0,), (1, 2), (0, 2), (2,)]
    assert REPLICATED.local_ids(2, absent=-1) == (0, -1, 1)


def test_a_sender_prefers_its_own_copy_and_the_others_take_turns() -> None:
    # Slot 0: groups 0 and 2 keep theirs; 1 and 3 have none: 1 is the first of them and takes copy 0, 3 takes copy 1.
    # Slot 2: only group 0 has none. It starts two copies further, at group 3.
    assert [REPLICATED.targets(group) for group in range(4)] == [(0, 1, 3), (0, 1, 1), (2, 1, 2), (2, 1, 3)]


@pytest.mark.parametrize("owners", [(), (2,), (-1,), (1, 0), (0, 0)])
def test_impossible_owners_are_refused(owners: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"slot 1 .* groups 0 to 1, ascending"):
        Placement(owners=((0,), owners), groups=2)


@pytest.mark.parametrize(("slots", "groups"), [(8, 2), (5, 2), (2, 3), (28, 4), (1, 1), (0, 2)])
def test_contiguous_covers_every_slot_once(slots: int, groups: int) -> None:
    placement = contiguous(slots, groups)
    owned = [placement.slots_of(group) for group in range(groups)]
    assert [slot for part in owned for slot in part] == list(range(slots))
    assert max(map(len, owned)) - min(map(len, owned)) <= 1


def _replicated_exchange(rank: int) -> tuple[list[list[float]], list[list[list[int]]], list[list[float]]]:
    group = dist.group.WORLD
    assert group is not None
    dispatcher = AllToAllDispatcher(group, Wire())
    targets_DG = targets_of(Placement(owners=((0, 1), (0,), (1,)), groups=2), rank)
    x_TH = torch.tensor([[10.0 * rank + 1]])
    ids_TNK = torch.tensor([[[0, 1, 2]]])
    sent = dispatcher.dispatch(x_TH, ids_TNK, torch.tensor([[[0.5, 0.25, 0.125]]]), targets_DG)
    weight_M1 = sent.weights_MNK.sum((1, 2))[:, None]
    (combined,) = dispatcher.combine((sent.rows_MH * weight_M1,), sent.exchange)
    return sent.rows_MH.tolist(), sent.local_ids_MNK.tolist(), combined.tolist()


def test_a_replicated_slot_acts_once() -> None:
    # Slot 0 lives on both ranks, slot 1 on rank 0, slot 2 on rank 1. Both tokens want all three, so both go to both
    # ranks; the copy of slot 0 on the token's own rank computes it, the other copy is not told.
    (rows_0, ids_0, out_0), (rows_1, ids_1, out_1) = run_ranks(2, _replicated_exchange)
    assert rows_0 == rows_1 == [[1.0], [11.0]]
    assert ids_0 == [[[0, 1, -1]], [[-1, 1, -1]]]
    assert ids_1 == [[[-1, -1, 1]], [[0, -1, 1]]]
    # The "expert" multiplies by the weights that reached it: 0.5 + 0.25 + 0.125, each once.
    assert out_0 == [[0.875]]
    assert out_1 == [[9.625]]
