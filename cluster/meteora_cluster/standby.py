"""Actors that wait beside the ranks, to take the place of one sooner than a new process could."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray.actor import ActorHandle
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup

from meteora_cluster.actors import kill
from meteora_cluster.waiting import value

Create = Callable[[Collection[int]], Mapping[int, ActorHandle[Any]]]
"""Starts one actor for each of some seats, in its place, and returns them by seat, at once."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    actor: ActorHandle[Any]
    preparing: asyncio.Task[Any]

    @property
    def ready(self) -> bool:
        return self.preparing.done() and self.preparing.exception() is None


class Standby:
    """A seat beside each rank. Whoever waits there reserves nothing, and may as well replace another rank of its node.

    Attributes:
        seats: The node of each seat, by rank.
    """

    def __init__(self, create: Create, seats: Mapping[int, str]) -> None:
        """Has nobody wait yet.

        Args:
            create: Starts the actors.
            seats: The node of each seat, by rank; none at all for nobody to wait ever.
        """
        self.seats = dict(seats)
        self._create = create
        self._waiting: dict[int, _Waiting] = {}

    @classmethod
    def beside(cls, placement: PlacementGroup, create: Create) -> Standby:
        """With a seat in every bundle of a placement group that has its place already."""
        nodes: dict[int, str] = placement_group_table(placement)["bundles_to_node_id"]
        return cls(create, nodes)

    @property
    def waiting(self) -> list[int]:
        """The seats that are taken."""
        return sorted(self._waiting)

    def fill(self) -> None:
        """Starts an actor for every empty seat, and lets it prepare itself; returns at once."""
        empty = sorted(self.seats.keys() - self._waiting.keys())
        for seat, actor in self._create(empty).items():
            self._waiting[seat] = _Waiting(actor, asyncio.ensure_future(value(actor.stand_by.remote())))

    def take(self, ranks: Iterable[int]) -> dict[int, ActorHandle[Any]]:
        """Hands actors over for ``ranks``, by rank, where there are any on their nodes: those that are ready first."""
        taken = {}
        for rank in ranks:
            near = [seat for seat in self._waiting if self.seats[seat] == self.seats[rank]]
            if near:
                seat = min(near, key=lambda seat: (not self._waiting[seat].ready, seat != rank, seat))
                taken[rank] = self._hand_over(seat)
        return taken

    def stop(self) -> None:
        """Ends everybody who waits."""
        for seat in self.waiting:
            kill(self._hand_over(seat))

    def _hand_over(self, seat: int) -> ActorHandle[Any]:
        waiting = self._waiting.pop(seat)
        waiting.preparing.cancel()
        return waiting.actor
