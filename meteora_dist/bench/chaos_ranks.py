"""A service whose ranks can be found and harmed from outside; everything else about them is as it always is."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import ray

from meteora_dist.serving.ranks import RankActor
from meteora_dist.serving.server import Server

Fault = Literal["kill", "stop", "raise"]


@dataclass(frozen=True, slots=True)
class Target:
    """One rank.

    Attributes:
        rank: Its number.
        pid: Its process on this machine.
        actor: Its handle.
    """

    rank: int
    pid: int
    actor: Any

    async def harm(self, fault: Fault) -> None:
        """Kills the process with -9, stops it, or makes its next forward pass raise."""
        if fault == "raise":
            await self.actor.break_next_pass.remote()
        else:
            os.kill(self.pid, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)


class Register:
    """An actor that knows the ranks there are: each tells it when it has started."""

    def __init__(self) -> None:
        self._targets: dict[int, Target] = {}

    def enter(self, target: Target) -> None:
        """Takes the place of the rank's predecessor."""
        self._targets[target.rank] = target

    def targets(self) -> list[Target]:
        """The newest of each rank."""
        return list(self._targets.values())


def register() -> Any:
    """The one register of this Ray; the first to ask makes it."""
    options = {"name": "register", "namespace": "meteora-chaos", "get_if_exists": True, "lifetime": "detached"}
    actor: Any = ray.remote(Register)
    return actor.options(num_cpus=0, **options).remote()


class FragileRank(RankActor):
    """A rank that enters itself into the register, and fails on request."""

    async def start(self, rendezvous: str) -> None:
        """Starts, then says where it is."""
        await super().start(rendezvous)
        context = ray.get_runtime_context()
        await register().enter.remote(Target(self._rank, os.getpid(), context.current_actor))

    async def break_next_pass(self) -> None:
        """Plants an error at the first routed linears of the model."""
        self._running().routed.groups[0].register_forward_pre_hook(_fail)


class FragileServer(Server):
    """A replica with such ranks."""

    member: ClassVar[type[RankActor]] = FragileRank


def _fail(*_: object) -> None:
    raise RuntimeError("a planted fault")
