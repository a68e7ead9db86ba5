"""A group of actors that start, live and end together."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from meteora_cluster.actors import create, kill
from meteora_cluster.errors import PlacementError, RankFailed
from meteora_cluster.heartbeat import Heartbeat, failing
from meteora_cluster.member import Member
from meteora_cluster.placement import Resources, check_bundles, world_bundles
from meteora_cluster.processes import LocalProcesses
from meteora_cluster.waiting import LAST_WORDS_S, all_of, calls, reason_of

_STARTING = "starting the ranks"
_NO_ACTORS: Mapping[int, ActorHandle[Any]] = {}


class ActorGroup:
    """The ranks of one world.

    They are owned by the process that launched them, so they die with it, and none is restarted on its own: a world
    that lost a rank is of no use.

    Attributes:
        actors: One handle a rank, in rank order; empty once stopped.
    """

    def __init__(self, own_placement: PlacementGroup | None) -> None:
        self.actors: tuple[ActorHandle[Any], ...] = ()
        self._own_placement = own_placement
        self._processes = LocalProcesses()
        self._silent: set[int] = set()

    @classmethod
    async def launch(
        cls,
        member: type[Member],
        arguments: Sequence[tuple[Any, ...]],
        rank: Resources,
        *,
        placement: PlacementGroup | None = None,
        driver: Resources | None = None,
        timeout_s: float = 600.0,
        max_concurrency: int = 1000,
        env: Mapping[str, str] | None = None,
        actors: Mapping[int, ActorHandle[Any]] = _NO_ACTORS,
        heartbeat: Heartbeat | None = None,
    ) -> ActorGroup:
        """Starts one actor a rank and returns once every one is ready.

        Args:
            member: The class of every rank.
            arguments: Constructor arguments, one tuple a rank.
            rank: What every rank reserves.
            placement: The placement group to live in, bundle i for rank i. None makes one, removed by :meth:`stop`.
            driver: What the launching process itself holds in bundle 0 of ``placement``.
            timeout_s: Seconds for placing the ranks, and again for starting them.
            max_concurrency: Calls one rank serves at a time.
            env: Environment variables of the ranks' processes.
            actors: Actors of ``placement`` that become ranks, with ``arguments`` anew, by rank; the others are new.
            heartbeat: How closely the ranks are watched while they start; None does not.

        Raises:
            PlacementError: The cluster has no room, or ``placement`` does not fit the world.
            RankFailed: A rank raised, died or no longer answered while starting; carries what each said.
            RankTimeout: A rank was not ready in time.
        """
        bundles = world_bundles(len(arguments), rank, driver)
        if placement is not None:
            check_bundles(placement.bundle_specs, bundles)
            home, group = placement, cls(None)
        else:
            home = await _placed(bundles, timeout_s)
            group = cls(home)
        try:
            new = {number: values for number, values in enumerate(arguments) if number not in actors}
            crew = {**actors, **create(member, new, rank, home, max_concurrency, env)}
            group.actors = tuple(crew[number] for number in range(len(arguments)))
            if actors:
                assigning = [crew[number].assign.remote(*arguments[number]) for number in actors]
                await all_of(assigning, "assigning the places", timeout_s)
            await group._meet(timeout_s, heartbeat)
        except BaseException:
            group.stop()
            raise
        return group

    async def watch(self, heartbeat: Heartbeat) -> RankFailed:
        """Waits until the first rank stops working, and returns what it said, or that it no longer says anything."""
        ends = calls([actor.watch.remote() for actor in self.actors])
        hangs = self._hangs(heartbeat)
        try:
            done, _ = await asyncio.wait([*ends, *hangs], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in [*ends, *hangs]:
                task.cancel()
        reasons = {hangs[task]: task.result() for task in done if task in hangs}
        self._silent = set(reasons)
        # What a rank says itself is worth more than that it no longer answers.
        for task in done & ends.keys():
            error = task.exception()
            reasons[ends[task]] = reason_of(error) if error else "it stopped on its own"
        return RankFailed("watching the ranks", reasons)

    def stop(self) -> None:
        """Kills every rank and gives the resources back; does nothing the second time."""
        for rank in range(len(self.actors)):
            self._kill(rank)
        self.actors = ()
        if self._own_placement is not None:
            remove_placement_group(self._own_placement)
            self._own_placement = None

    async def dissolve(self, timeout_s: float) -> dict[int, ActorHandle[Any]]:
        """Ends a group that has lost ranks, in a placement group that stays; returns the actors that may be used again.

        Args:
            timeout_s: Seconds that the ranks have to leave.

        Returns:
            By rank, those that have left in time; the others are killed.
        """
        try:
            # The others cannot leave an exchange with one that is neither here nor gone.
            for rank in self._silent:
                self._kill(rank)
            leaving = calls([actor.leave.remote() for actor in self.actors])
            done, _ = await asyncio.wait(leaving, timeout=timeout_s)
            for task in leaving:
                task.cancel()
            left = {leaving[task] for task in done if not task.exception()}
        except BaseException:
            self.stop()
            raise
        kept = {rank: self.actors[rank] for rank in sorted(left)}
        for rank in range(len(self.actors)):
            self._processes.let_go(rank) if rank in kept else self._kill(rank)
        self.actors = ()
        return kept

    def _kill(self, rank: int) -> None:
        kill(self.actors[rank])
        self._processes.kill(rank)

    async def _meet(self, timeout_s: float, heartbeat: Heartbeat | None) -> None:
        where = await all_of([actor.whereabouts.remote() for actor in self.actors], "finding the ranks", timeout_s)
        self._processes.hold(dict(enumerate(where)))
        (meeting,) = await all_of([self.actors[0].rendezvous.remote()], "choosing the meeting point", timeout_s)
        calls_of_start = [actor.start.remote(meeting) for actor in self.actors]
        starts = asyncio.ensure_future(all_of(calls_of_start, _STARTING, timeout_s))
        hangs = self._hangs(heartbeat) if heartbeat else {}
        try:
            done, _ = await asyncio.wait([starts, *hangs], return_when=asyncio.FIRST_COMPLETED)
            # What a rank says itself is worth more than that it no longer answers.
            await asyncio.wait([starts], timeout=LAST_WORDS_S if hangs.keys() & done else None)
            if not starts.done():
                raise RankFailed(_STARTING, {hangs[task]: task.result() for task in done & hangs.keys()})
            starts.result()
        finally:
            for task in [starts, *hangs]:
                task.cancel()

    def _hangs(self, heartbeat: Heartbeat) -> dict[asyncio.Task[str], int]:
        """One task a rank, with its number, that ends when the rank no longer answers or makes progress."""
        return {asyncio.ensure_future(failing(actor, heartbeat)): rank for rank, actor in enumerate(self.actors)}


async def _placed(bundles: list[dict[str, float]], timeout_s: float) -> PlacementGroup:
    group: PlacementGroup = placement_group(bundles, strategy="PACK")
    try:
        await asyncio.wait_for(_ready(group), timeout_s)
    except (TimeoutError, GetTimeoutError):
        remove_placement_group(group)
        total = {name: amount for name, amount in ray.cluster_resources().items() if name in ("CPU", "GPU")}
        message = f"no room for the bundles {bundles} within {timeout_s:.0f} s; the whole cluster has {total}"
        raise PlacementError(message) from None
    except BaseException:
        remove_placement_group(group)
        raise
    return group


async def _ready(group: PlacementGroup) -> None:
    await group.ready()
