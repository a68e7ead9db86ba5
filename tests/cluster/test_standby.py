"""Who waits on standby, and who is taken first; actors are stand-ins, as the real ones are in test_group."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

from meteora_cluster.standby import Standby


class Waiting:
    """An actor as far as ``Standby`` knows one."""

    def __init__(self, seat: int) -> None:
        self.seat = seat
        self.prepared: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stand_by = SimpleNamespace(remote=lambda: self.prepared)


class Standbys:
    """A standby and everybody it has ever started."""

    def __init__(self, *nodes: str) -> None:
        self.started: list[Waiting] = []
        self.standby = Standby(self.create, dict(enumerate(nodes)))
        self.standby.fill()

    def create(self, seats: Collection[int]) -> dict[int, Any]:
        new = {seat: Waiting(seat) for seat in seats}
        self.started += new.values()
        return new

    async def prepared(self, *seats: int) -> None:
        for seat in seats:
            self.started[seat].prepared.set_result(None)
        await asyncio.sleep(0.01)

    def taken(self, *ranks: int) -> dict[int, int]:
        return {rank: actor.seat for rank, actor in self.standby.take(ranks).items()}  # type: ignore[attr-defined]


async def test_the_one_beside_a_rank_takes_its_place() -> None:
    standbys = Standbys("a", "a")
    await standbys.prepared(0, 1)
    assert standbys.taken(1) == {1: 1}
    assert standbys.standby.waiting == [0]


async def test_a_neighbour_that_is_ready_goes_first() -> None:
    standbys = Standbys("a", "a", "a")
    await standbys.prepared(2)
    assert standbys.taken(1) == {1: 2}
    assert standbys.taken(1) == {1: 1}, "none is ready: its own is as good as any"
    assert standbys.taken(1) == {1: 0}
    assert standbys.taken(1) == {}


async def test_nobody_changes_nodes() -> None:
    standbys = Standbys("a", "b")
    await standbys.prepared(0)
    assert standbys.taken(1) == {1: 1}
    assert standbys.taken(1) == {}
    assert standbys.taken(0) == {0: 0}


async def test_one_that_failed_to_prepare_goes_last() -> None:
    standbys = Standbys("a", "a")
    standbys.started[0].prepared.set_exception(ImportError("no engine"))
    await standbys.prepared(1)
    assert standbys.taken(0) == {0: 1}


async def test_only_empty_seats_are_filled() -> None:
    standbys = Standbys("a", "a")
    standbys.standby.fill()
    assert len(standbys.started) == 2
    standbys.taken(0)
    standbys.standby.fill()
    assert [waiting.seat for waiting in standbys.started] == [0, 1, 0]
    assert standbys.standby.waiting == [0, 1]


async def test_without_seats_nobody_waits() -> None:
    standbys = Standbys()
    assert standbys.started == []
    assert standbys.taken() == {}
