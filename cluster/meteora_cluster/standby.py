"""Actors that wait in the places of a group, to become the next one sooner than new processes could."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup

from meteora_cluster.actors import create
from meteora_cluster.member import Member
from meteora_cluster.placement import Resources


class Standby:
    """One actor for each bundle of a placement group; it reserves nothing beside the rank that is there already."""

    def __init__(self, actors: Sequence[ActorHandle[Any]] = ()) -> None:
        self._actors = tuple(actors)

    @classmethod
    def create(
        cls, member: type[Member], arguments: Sequence[tuple[Any, ...]], placement: PlacementGroup, max_concurrency: int
    ) -> Standby:
        """Starts the actors, and lets each prepare itself; returns at once.

        Args:
            member: The class of every rank.
            arguments: Constructor arguments, one tuple a rank.
            placement: Where the ranks live, bundle i for rank i.
            max_concurrency: Calls one rank serves at a time.
        """
        standby = cls(create(member, arguments, Resources(), placement, max_concurrency))
        for actor in standby._actors:
            actor.stand_by.remote()
        return standby

    def take(self) -> tuple[ActorHandle[Any], ...]:
        """Hands the actors over, in rank order; there are none the second time."""
        actors, self._actors = self._actors, ()
        return actors

    def stop(self) -> None:
        """Ends them, unless they were taken."""
        for actor in self.take():
            with contextlib.suppress(RayActorError, ValueError):
                ray.kill(actor)
