"""Groups of real actors: they start together, tell what failed, notice a death and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
from importlib import import_module
from typing import Any

import pytest
import ray
from ray.util import placement_group, placement_group_table, remove_placement_group

from meteora_cluster.actors import create
from meteora_cluster.errors import PlacementError, RankFailed, RankTimeout
from meteora_cluster.group import ActorGroup
from meteora_cluster.heartbeat import Heartbeat
from meteora_cluster.member import OWN_PORTS, Member, free_port
from meteora_cluster.placement import Resources, world_bundles
from meteora_cluster.standby import Standby

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("own_ray")]

psutil: Any = import_module("psutil")
HALF = Resources(cpus=0.5)
NOTHING = Resources()
CLOSELY = Heartbeat(every_s=0.2, answer_s=2, stall_s=5)


class Walker(Member):
    """A rank that does what its plan says."""

    prepared = False

    def __init__(self, rank: int, plan: str = "work") -> None:
        self.rank = rank
        self.plan = plan
        self.meeting = ""

    async def stand_by(self) -> None:
        type(self).prepared = True

    async def start(self, rendezvous: str) -> None:
        if self.plan == "refuse":
            raise ValueError("no weights for layer 7")
        if self.plan == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.plan == "sleep":
            await asyncio.sleep(3600)
        self.meeting = rendezvous

    async def leave(self) -> None:
        await asyncio.sleep(3600 if self.plan == "hang" else 0)

    async def watch(self) -> None:
        await asyncio.sleep(0.2 if self.plan == "give up" else 3600)
        raise RuntimeError("the loop ended")

    async def beat(self) -> float | None:
        return 7.0 if self.plan == "dawdle" else None

    async def is_prepared(self) -> bool:
        return self.prepared

    async def about(self) -> tuple[int, str, int]:
        return self.rank, self.meeting, os.getpid()


async def test_every_rank_starts_with_its_own_arguments_and_the_same_meeting_point() -> None:
    group = await ActorGroup.launch(Walker, [(0,), (1,), (2,)], HALF, timeout_s=60)
    try:
        about = await asyncio.gather(*(actor.about.remote() for actor in group.actors))
    finally:
        group.stop()
    assert [rank for rank, _, _ in about] == [0, 1, 2]
    assert len({pid for _, _, pid in about}) == 3
    (meeting,) = {meeting for _, meeting, _ in about}
    assert int(meeting.rpartition(":")[2]) in OWN_PORTS


async def test_a_group_lives_in_a_given_placement_group_and_leaves_it_alone() -> None:
    home = placement_group(world_bundles(2, HALF, driver=Resources(cpus=0.25)))
    group = await ActorGroup.launch(
        Walker, [(0,), (1,)], HALF, placement=home, driver=Resources(cpus=0.25), timeout_s=60
    )
    group.stop()
    group.stop()
    assert placement_group_table(home)["state"] == "CREATED"
    remove_placement_group(home)


async def test_actors_on_standby_wait_beside_the_ranks_and_take_their_places() -> None:
    home = placement_group(world_bundles(2, HALF))
    first = await ActorGroup.launch(Walker, [(0,), (1,)], HALF, placement=home, timeout_s=60)
    standby = Standby.beside(home, lambda seats: create(Walker, {seat: (seat,) for seat in seats}, NOTHING, home, 10))
    standby.fill()
    try:
        waiting = standby.take([0, 1])
        pids = [pid for _, _, pid in await asyncio.gather(*(waiting[rank].about.remote() for rank in (0, 1)))]
        first.stop()
        second = await ActorGroup.launch(Walker, [(10,), (11,)], HALF, placement=home, timeout_s=60, actors=waiting)
        about = await asyncio.gather(*(actor.about.remote() for actor in second.actors))
        prepared = await asyncio.gather(*(actor.is_prepared.remote() for actor in second.actors))
    finally:
        remove_placement_group(home)
    assert [(rank, pid) for rank, _, pid in about] == [(10, pids[0]), (11, pids[1])]
    assert all(meeting for _, meeting, _ in about)
    assert prepared == [True, True]


@pytest.mark.parametrize("plan", ["work", "hang"])
async def test_whoever_leaves_a_lost_group_in_time_is_of_the_next(plan: str) -> None:
    home = placement_group(world_bundles(3, HALF))
    group = await ActorGroup.launch(Walker, [(0,), (1,), (2, plan)], HALF, placement=home, timeout_s=60)
    pids = [pid for _, _, pid in await asyncio.gather(*(actor.about.remote() for actor in group.actors))]
    watch = asyncio.ensure_future(group.watch(CLOSELY))
    os.kill(pids[1], signal.SIGSTOP)
    await asyncio.wait_for(watch, timeout=5)
    try:
        left = await group.dissolve(timeout_s=1)
        assert sorted(left) == ([0, 2] if plan == "work" else [0])
        group.stop()
        for rank in {0, 1, 2} - set(left):
            async with asyncio.timeout(3):
                while psutil.pid_exists(pids[rank]):
                    await asyncio.sleep(0.05)
        arguments = [(10,), (11,), (12,)]
        second = await ActorGroup.launch(Walker, arguments, HALF, placement=home, timeout_s=60, actors=left)
        about = await asyncio.gather(*(actor.about.remote() for actor in second.actors))
        second.stop()
    finally:
        remove_placement_group(home)
    assert [rank for rank, _, _ in about] == [10, 11, 12]
    assert [rank for rank in range(3) if about[rank][2] == pids[rank]] == sorted(left)
    await _nothing_left()


async def test_the_error_of_a_start_carries_the_ranks_own_message() -> None:
    with pytest.raises(RankFailed, match="rank 1: ValueError: no weights for layer 7") as caught:
        await ActorGroup.launch(Walker, [(0, "sleep"), (1, "refuse")], HALF, timeout_s=60)
    assert set(caught.value.reasons) == {1}
    await _nothing_left()


async def test_a_rank_that_never_gets_ready_is_named() -> None:
    with pytest.raises(RankTimeout, match="no answer from rank 1 within 15 s"):
        await ActorGroup.launch(Walker, [(0,), (1, "sleep")], HALF, timeout_s=15)
    await _nothing_left()


async def test_a_rank_that_is_stopped_while_it_starts_is_noticed_in_time() -> None:
    with pytest.raises(RankFailed, match="starting the ranks: rank 1: it did not answer within 2 s"):
        await ActorGroup.launch(Walker, [(0,), (1, "freeze")], HALF, timeout_s=60, heartbeat=CLOSELY)
    await _nothing_left()


async def test_no_room_is_said_with_both_numbers() -> None:
    with pytest.raises(PlacementError, match=r"CPU': 64.*the whole cluster has .*CPU"):
        await ActorGroup.launch(Walker, [(0,)], Resources(cpus=64), timeout_s=1)


async def test_a_killed_process_is_noticed_at_once() -> None:
    group = await ActorGroup.launch(Walker, [(0,), (1,)], HALF, timeout_s=60)
    try:
        watch = asyncio.ensure_future(group.watch(CLOSELY))
        _, _, pid = await group.actors[1].about.remote()
        os.kill(pid, signal.SIGKILL)
        failed = await asyncio.wait_for(watch, timeout=5)
    finally:
        group.stop()
    assert failed.reasons == {1: "its process ended"}
    await _nothing_left()


async def test_a_stopped_process_is_noticed_in_time_and_ended_at_once() -> None:
    group = await ActorGroup.launch(Walker, [(0,), (1,)], HALF, timeout_s=60)
    try:
        watch = asyncio.ensure_future(group.watch(CLOSELY))
        _, _, pid = await group.actors[1].about.remote()
        os.kill(pid, signal.SIGSTOP)
        failed = await asyncio.wait_for(watch, timeout=5)
        assert failed.reasons == {1: "it did not answer within 2 s"}
    finally:
        group.stop()
    # Ray alone takes five seconds.
    async with asyncio.timeout(3):
        while psutil.pid_exists(pid):
            await asyncio.sleep(0.05)
    await _nothing_left()


async def test_a_rank_without_progress_is_noticed() -> None:
    group = await ActorGroup.launch(Walker, [(0,), (1, "dawdle")], HALF, timeout_s=60)
    failed = await asyncio.wait_for(group.watch(CLOSELY), timeout=5)
    group.stop()
    assert failed.reasons == {1: "it has work, but made no progress for 7 s"}


async def test_a_rank_that_gives_up_is_noticed_with_its_message() -> None:
    group = await ActorGroup.launch(Walker, [(0,), (1, "give up")], HALF, timeout_s=60)
    failed = await asyncio.wait_for(group.watch(CLOSELY), timeout=5)
    group.stop()
    assert failed.reasons == {1: "RuntimeError: the loop ended"}


def test_free_ports_stay_out_of_rays_range() -> None:
    assert all(free_port() in OWN_PORTS for _ in range(20))


async def _nothing_left() -> None:
    for _ in range(50):
        cpus = ray.available_resources().get("CPU", 0.0)
        if cpus == ray.cluster_resources()["CPU"]:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"only {cpus} CPUs came back")
