"""Swaps rows through memory that the ranks of one machine share: the quick twin of ``GroupSwap``.

Every rank has a box for what it gives, in two halves that take turns, and a semaphore for each rank it gives to:

    rank 0   writes half n % 2 of box 0, posts 0 -> 1, waits for 1 -> 0, reads its part of half n % 2 of box 1
    rank 1   writes half n % 2 of box 1, posts 1 -> 0, waits for 0 -> 1, reads its part of half n % 2 of box 0

Two halves are enough: who begins swap n + 2 has the posts of all others for swap n + 1, and each of them gave it after
it had read all of swap n.

Shapes: D ranks, M = D * C rows of B numbers, C of them for each rank.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from meteora_dist.moe.shared_memory import Address, Segment, Semaphores
from meteora_dist.moe.swap import GroupSwap, Swap

HALF_BYTES = 16 << 20
"""Most bytes that a rank gives in one swap; larger ones go through the process group."""
_LOOK_S = 0.5
"""How often a waiting rank looks whether the one it waits for still lives."""
_NOWHERE = Address(0, 0, 0)


class SharedSwap:
    """A ``Swap`` of CPU tensors between processes of one machine."""

    def __init__(self, segment: Segment, group: dist.ProcessGroup, timeout: timedelta) -> None:
        """Joins the ranks of ``group``, each of which has entered the segment under its number in the group.

        Args:
            segment: As ``meet`` makes it.
            group: For what is too large.
            timeout: How long a rank waits for another.
        """
        self._segment = segment
        self._ranks, self._rank = group.size(), group.rank()
        self._others = [rank for rank in range(self._ranks) if rank != self._rank]
        self._semaphores = Semaphores(segment, self._ranks**2)
        self._otherwise = GroupSwap(group)
        self._timeout = timeout
        self._half = 0
        self._known: dict[tuple[int, torch.Size, torch.dtype], tuple[Tensor, list[Tensor]]] = {}

    def __call__(self, outgoing_MB: Tensor) -> Tensor:
        """See ``Swap``."""
        if not 0 < outgoing_MB.nbytes <= HALF_BYTES:
            return self._otherwise(outgoing_MB)
        box_MB, parts_CB = self._views(outgoing_MB)
        self._half = 1 - self._half
        box_MB.copy_(outgoing_MB)
        for other in self._others:
            self._semaphores.post(self._rank * self._ranks + other)
        for other in self._others:
            self._await(other)
        return torch.cat(parts_CB)

    def _await(self, other: int) -> None:
        number = other * self._ranks + self._rank
        last = time.monotonic() + self._timeout.total_seconds()
        while not self._semaphores.wait(number, _LOOK_S):
            gone = not self._segment.has(other)
            # It may have given its part before it went.
            if gone and not self._semaphores.wait(number, 0):
                raise dist.DistNetworkError(f"rank {other} of the exchange is gone; rank {self._rank} waited for it")
            if time.monotonic() > last:
                raise dist.DistNetworkError(
                    f"rank {other} of the exchange did not come within {self._timeout.total_seconds():.0f} s; "
                    f"rank {self._rank} waited for it"
                )

    def _views(self, like_MB: Tensor) -> tuple[Tensor, list[Tensor]]:
        """This rank's box in the present half, and the rows for this rank in the boxes of all, in their order."""
        key = (self._half, like_MB.shape, like_MB.dtype)
        if key not in self._known:
            boxes_MB = [self._box(rank, like_MB) for rank in range(self._ranks)]
            self._known[key] = boxes_MB[self._rank], [box_MB.chunk(self._ranks)[self._rank] for box_MB in boxes_MB]
        return self._known[key]

    def _box(self, rank: int, like_MB: Tensor) -> Tensor:
        start = _boxes_start(self._ranks) + (2 * rank + self._half) * HALF_BYTES
        flat = torch.frombuffer(self._segment.memory, dtype=like_MB.dtype, count=like_MB.numel(), offset=start)
        return flat.view(like_MB.shape)


def quickest_swap(group: dist.ProcessGroup, timeout: timedelta) -> Swap:
    """The quickest way to swap CPU tensors that all ranks of ``group`` have; all of them call it.

    Args:
        group: One rank of every expert-parallel group, in their order.
        timeout: How long a rank waits for another.
    """
    segment = _meet(group)
    everywhere = torch.tensor(int(segment is not None))
    dist.all_reduce(everywhere, dist.ReduceOp.MIN, group=group)
    return SharedSwap(segment, group, timeout) if segment is not None and everywhere else GroupSwap(group)


def _meet(group: dist.ProcessGroup) -> Segment | None:
    """The segment of the group's first rank, entered by this one; None where that does not work."""
    ranks, rank = group.size(), group.rank()
    segment = _attempt(lambda: _made(ranks)) if rank == 0 else None
    address = torch.tensor(_NOWHERE if segment is None else segment.address)
    dist.broadcast(address, group_src=0, group=group)
    return segment if rank == 0 else _attempt(lambda: _opened(Address(*address.tolist()), ranks, rank))


def _attempt(get: Callable[[], Segment]) -> Segment | None:
    with suppress(OSError):
        return get()
    return None


def _made(ranks: int) -> Segment:
    segment = Segment.create(_nbytes(ranks))
    Semaphores(segment, ranks**2).create()
    segment.enter(0)
    return segment


def _opened(address: Address, ranks: int, rank: int) -> Segment:
    segment = Segment.open(address, _nbytes(ranks))
    Semaphores(segment, ranks**2)
    segment.enter(rank)
    return segment


def _nbytes(ranks: int) -> int:
    return _boxes_start(ranks) + 2 * ranks * HALF_BYTES


def _boxes_start(ranks: int) -> int:
    """Where the boxes begin: behind the semaphores, at a new page."""
    return -(-(ranks**2 * Semaphores.BYTES) // mmap.PAGESIZE) * mmap.PAGESIZE
