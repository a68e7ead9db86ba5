"""What a class must be able to do to be a rank of a group."""

from __future__ import annotations

import os
import random
import socket
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.util

OWN_PORTS = range(20_000, 32_768)
"""Ray hands ports below these to its workers at any time, and Linux those above to outgoing connections."""


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Which process a rank is.

    Attributes:
        node: Ray's id of its node.
        pid: Its process id there.
    """

    node: str
    pid: int


class Member(ABC):
    """One rank: a plain class that :class:`~meteora_cluster.group.ActorGroup` runs as a Ray actor.

    The constructor must return at once; the work that needs the other ranks belongs into :meth:`start`.
    """

    async def rendezvous(self) -> str:
        """``host:port`` on this rank's node where the world can meet; asked of rank 0 only."""
        return f"{ray.util.get_node_ip_address()}:{free_port()}"

    async def whereabouts(self) -> Whereabouts:
        """Which process this rank is."""
        return Whereabouts(ray.get_runtime_context().get_node_id(), os.getpid())

    @abstractmethod
    async def stand_by(self) -> None:
        """Does what can be done ahead of :meth:`start`, without the other ranks and without a device."""

    async def assign(self, *arguments: Any) -> None:
        """Takes other constructor arguments, ahead of :meth:`start`."""
        type(self).__init__(self, *arguments)

    @abstractmethod
    async def leave(self) -> None:
        """Leaves a world that has lost a rank, wherever it waits for it, and frees what it holds; may start again."""

    @abstractmethod
    async def start(self, rendezvous: str) -> None:
        """Joins the world that meets at ``rendezvous`` (``host:port``) and returns once this rank is ready."""

    @abstractmethod
    async def watch(self) -> None:
        """Runs for as long as this rank works, and raises when it no longer does."""

    @abstractmethod
    async def beat(self) -> float | None:
        """Seconds since this rank last made progress, or None when it has nothing to do or is still to start."""


def free_port(host: str = "") -> int:
    """A TCP port nobody listens on, of those that neither Ray's workers nor outgoing connections are given."""
    while True:
        port = random.SystemRandom().choice(OWN_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            return port
