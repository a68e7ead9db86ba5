"""Swaps rows through memory that the ranks of one machine share: the quick twin of ``GroupSwap``.

Every rank has a box for what it gives, in two halves that take turns, and a semaphore for each rank it gives to:

    rank 0   writes half n % 2 of box 0, posts 0 -> 1, waits for 1 -> 0, reads its part of half n % 2 of box 1
    rank 1   writes half n % 2 of box 1, posts 1 -> 0, waits for 0 -> 1, reads its part of half n % 2 of box 0

Two halves are enough: who begins swap n + 2 has the posts of all others for swap n + 1, and each of them gave it after
it had read all of swap n.

Shapes: as in ``swap.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from meteora_dist.moe.shared_memory import CACHE_LINE, Address, Segment, Semaphores
from meteora_dist.moe.swap import Finish, GroupSwap, Kind, Parts, Swap

HALF_BYTES = 16 << 20
"""Most bytes that a rank gives in one swap; larger ones go through the process group."""
_LOOK_S = 0.2
"""How often a waiting rank looks whether the one it waits for still lives."""
_NOWHERE = Address(0, 0, 0)


class _Views(NamedTuple):
    """Where the tensors of one swap lie.

    Attributes:
        box: In this rank's box.
        parts: For each tensor, what is for this rank in the boxes of all, in their order.
    """

    box: tuple[Tensor, ...]
    parts: tuple[tuple[Tensor, ...], ...]


class SharedSwap:
    """A ``Swap`` of CPU tensors between processes of one machine."""

    few_tokens = 512

    def __init__(self, segment: Segment, group: dist.ProcessGroup, timeout: timedelta) -> None:
        """Joins the ranks of ``group``, each of which has entered the segment under its number in the group.

        Args:
            segment: Of this group, its semaphores at zero.
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
        self._known: dict[tuple[int, tuple[Kind, ...]], _Views | None] = {}

    def room(self, *kinds: Kind) -> tuple[Tensor, ...]:
        """See ``Swap``: in this rank's box."""
        views = self._views(kinds)
        return self._otherwise.room(*kinds) if views is None else views.box

    def give(self, *outgoing_D: Tensor) -> Finish:
        """See ``Swap``."""
        views = self._views(tuple((values_D.shape, values_D.dtype) for values_D in outgoing_D))
        if views is None:
            return self._otherwise.give(*outgoing_D)
        self._half = 1 - self._half
        for box_D, values_D in zip(views.box, outgoing_D, strict=True):
            if values_D is not box_D:
                box_D.copy_(values_D)
        for other in self._others:
            self._semaphores.post(self._rank * self._ranks + other)

        def finish() -> tuple[Parts, ...]:
            for other in self._others:
                self._await(other)
            return views.parts

        return finish

    def _await(self, other: int) -> None:
        number = other * self._ranks + self._rank
        last = time.monotonic() + self._timeout.total_seconds()
        while not self._semaphores.wait(number, _LOOK_S):
            if not self._segment.has(other):
                # It may have given its part before it went.
                if self._semaphores.wait(number, 0):
                    return
                raise dist.DistNetworkError(f"rank {other} of the exchange is gone; rank {self._rank} waited for it")
            if time.monotonic() > last:
                raise dist.DistNetworkError(
                    f"rank {other} of the exchange did not come within {self._timeout.total_seconds():.0f} s; "
                    f"rank {self._rank} waited for it"
                )

    def _views(self, kinds: tuple[Kind, ...]) -> _Views | None:
        """Of the half that is next, for tensors of these kinds; None when they do not fit."""
        key = (self._half, kinds)
        if key not in self._known:
            self._known[key] = self._view(kinds)
        return self._known[key]

    def _view(self, kinds: tuple[Kind, ...]) -> _Views | None:
        sizes = (_aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in kinds)
        starts = list(accumulate(sizes, initial=0))
        if starts[-1] > HALF_BYTES:
            return None
        boxes = [
            [self._in_box(rank, start, kind) for rank in range(self._ranks)]
            for start, kind in zip(starts[:-1], kinds, strict=True)
        ]
        return _Views(
            box=tuple(of_ranks[self._rank] for of_ranks in boxes),
            parts=tuple(tuple(box_D[self._rank] for box_D in of_ranks) for of_ranks in boxes),
        )

    def _in_box(self, rank: int, start: int, kind: Kind) -> Tensor:
        shape, dtype = kind
        start += _boxes_start(self._ranks) + (2 * rank + 1 - self._half) * HALF_BYTES
        return torch.frombuffer(self._segment.memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)


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
    """Where the boxes begin: behind the semaphores."""
    return _aligned(ranks**2 * Semaphores.BYTES)


def _aligned(nbytes: int) -> int:
    """Up to the next cache line, so that no two ranks write to one; every dtype may begin there."""
    return -(-nbytes // CACHE_LINE) * CACHE_LINE
