"""Ranks that a measurement can find; everything else about them is as it always is."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import ray

from meteora_dist.serving.ranks import RankActor


@dataclass(frozen=True, slots=True)
class Found:
    """One rank.

    Attributes:
        rank: Its number.
        pid: Its process on this machine.
        start: Which start of that process it is: one that outlives a crew may start again.
        actor: Its handle.
    """

    rank: int
    pid: int
    start: int
    actor: Any


class Register:
    """An actor that knows the ranks there are: each tells it when it has started."""

    def __init__(self) -> None:
        self._ranks: dict[int, Found] = {}

    def enter(self, found: Found) -> None:
        """Takes the place of the rank's predecessor."""
        self._ranks[found.rank] = found

    def ranks(self) -> list[Found]:
        """The newest of each rank."""
        return list(self._ranks.values())


def register() -> Any:
    """The one register of this Ray; the first to ask makes it."""
    options = {"name": "register", "namespace": "meteora-bench", "get_if_exists": True, "lifetime": "detached"}
    actor: Any = ray.remote(Register)
    return actor.options(num_cpus=0, **options).remote()


async def ranks() -> list[Found]:
    """The ranks that have started, by number."""
    found: list[Found] = await register().ranks.remote()
    return sorted(found, key=lambda one: one.rank)


class FindableRank(RankActor):
    """A rank that enters itself into the register."""

    _starts = 0

    async def start(self, rendezvous: str) -> None:
        """Starts, then says where it is."""
        await super().start(rendezvous)
        # Of the class, as the instance is made anew for another start.
        FindableRank._starts += 1
        actor = ray.get_runtime_context().current_actor
        await register().enter.remote(Found(self._rank, os.getpid(), FindableRank._starts, actor))
