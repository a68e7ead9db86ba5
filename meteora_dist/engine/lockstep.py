"""How the ranks of a world keep in step: they vote before every step, and sleep together when nobody has work."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
"""How long a rank waits for the others before it gives up."""
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
"""What torch.distributed exchanges tensors with, by the device a rank computes on; votes are CPU tensors everywhere."""
_NAP = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Vote:
    """What a rank brings to a step, and, once all have voted, what the step is for everybody.

    Attributes:
        working: Whether the rank has a batch; of the world: whether any has.
        slots: Expert slots its batch needs; of the world: the most.
        staying: Whether the rank goes on when there is no work; of the world: whether any does.
        change: The newest change of the experts the rank may switch to; of the world: the oldest among them.
        tokens: Tokens of its batch; of the world: the most.
    """

    working: bool
    slots: int
    staying: bool
    change: int = 0
    tokens: int = 0


class Lockstep(Protocol):
    """The ranks of one world, as one of them sees it."""

    def agree(self, vote: Vote) -> Vote:
        """The world's vote. Collective; called by the loop's thread alone."""
        ...

    def sleep(self) -> None:
        """Sleeps until any rank wakes the world. Every rank calls it after the same vote, or none does."""
        ...

    def wake(self) -> None:
        """Ends the sleep of all ranks, or keeps them from falling asleep next time. For any thread."""
        ...


class Alone:
    """A world of one rank."""

    def __init__(self) -> None:
        """Starts awake."""
        self._woken = threading.Event()

    def agree(self, vote: Vote) -> Vote:
        """Its own vote decides."""
        return vote

    def sleep(self) -> None:
        """See ``Lockstep``."""
        self._woken.wait()
        self._woken.clear()

    def wake(self) -> None:
        """See ``Lockstep``."""
        self._woken.set()


class Together:
    """Several ranks: they vote by all-reduce, and sleep in a blocking read of the key that the first to wake writes.

    Sleeps are numbered. ``wake`` writes the key of the sleep under way or, between two, of the next one, so that a
    wake-up is never lost, wherever the other ranks are.
    """

    def __init__(self, store: TCPStore) -> None:
        """Joins in; the process group of the world exists already, and ``store`` is the one it met at."""
        self._reader = store.clone()  # type: ignore[attr-defined]
        self._writer = store.clone()  # type: ignore[attr-defined]
        self._lock = threading.Lock()
        self._sleeps = 0
        self._rank = dist.get_rank()

    def agree(self, vote: Vote) -> Vote:
        """See ``Lockstep``."""
        # One reduction for all: the oldest change is the largest of the negated ones.
        votes = torch.tensor([int(vote.working), vote.slots, int(vote.staying), -vote.change, vote.tokens])
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        working, slots, staying, change, tokens = votes.tolist()
        return Vote(bool(working), slots, bool(staying), -change, tokens)

    def sleep(self) -> None:
        """See ``Lockstep``."""
        self._reader.wait([_key(self._sleeps)], _NAP)
        with self._lock:
            self._sleeps += 1
        # All ranks have voted since the sleep before this one, so nobody reads its key any more.
        if self._rank == 0 and self._sleeps > 1:
            self._writer.delete_key(_key(self._sleeps - 2))

    def wake(self) -> None:
        """See ``Lockstep``."""
        with self._lock:
            self._writer.set(_key(self._sleeps), "")


def join(rank: int, size: int, rendezvous: str | None, backend: str = "gloo") -> Lockstep:
    """Joins the world, and its default process group, when it has more than one rank.

    Args:
        rank: This rank.
        size: Ranks in all.
        rendezvous: ``tcp://host:port``, where rank 0 listens and all meet; None for a world of one.
        backend: Of torch.distributed; it must take CPU tensors for the votes.

    Raises:
        ValueError: Several ranks, but nowhere to meet.
    """
    if size == 1:
        return Alone()
    if rendezvous is None:
        raise ValueError(f"a world of {size} ranks needs a rendezvous address")
    host, _, port = rendezvous.removeprefix("tcp://").rpartition(":")
    store = TCPStore(host, int(port), size, is_master=rank == 0, timeout=COLLECTIVE_TIMEOUT)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT)
    return Together(store)


def _key(sleep: int) -> str:
    return f"awake/{sleep}"
