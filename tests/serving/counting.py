"""Ranks for the tests of what surrounds them: real Ray actors that count instead of running a model."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import suppress

from meteora_cluster.member import Member
from meteora_dist.engine.report import RankReport
from meteora_dist.engine.request import GenerationRequest, TokenEvent
from meteora_dist.errors import BankError, EngineUnavailable, InvalidRequest
from meteora_dist.moe.residency import Residency
from meteora_dist.serving.config import ServiceConfig

POISON = 13


class CountingRank(Member):
    """Produces the position of each token; ``shares`` has the number of the rank, ``seed`` is milliseconds a token.

    Files in the bank's folder say how it starts: ``slow`` for never ready, ``broken`` for an error; and how it changes
    what it holds: ``slow prepare`` and ``slow commit`` for never ready, ``unloadable`` for an error on rank 1.
    """

    imported = False

    def __init__(self, config: ServiceConfig, rank: int, residency: Residency) -> None:
        self.folder = config.bank
        self.residency = residency
        self.prepared: dict[int, Residency] = {}
        self.rank = rank
        self.live: set[str] = set()
        self.stalled: float | None = None
        self.over = asyncio.Event()
        self.left = asyncio.Event()

    async def stand_by(self) -> None:
        type(self).imported = True

    async def start(self, rendezvous: str) -> None:
        if (self.folder / "broken").exists():
            raise ValueError("no weights for layer 7")
        await self.delay("slow")

    async def leave(self) -> None:
        self.left.set()

    async def watch(self) -> None:
        await self.over.wait()
        raise EngineUnavailable("a broken kernel")

    async def beat(self) -> float | None:
        return self.stalled

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        live, left = self.live, self.left
        live.add(request.request_id)
        try:
            first = len(request.prompt_ids)
            if request.generation not in {None, *self.residency.folders}:
                raise InvalidRequest(f"generation {request.generation} is not served")
            if request.prompt_ids[0] == POISON:
                raise EngineUnavailable("a poisoned request")
            if request.prompt_ids == (POISON + 1,):
                raise InvalidRequest("no fourteens", "prompt")
            for position in range(first, first + request.max_tokens):
                if await over_within(left, request.sampling.seed / 1000):
                    raise EngineUnavailable("it has left its world")
                last = position == first + request.max_tokens - 1
                yield TokenEvent(position, "length" if last else None, (float(self.rank),))
        finally:
            live.remove(request.request_id)

    async def prepare(self, number: int, residency: Residency) -> None:
        await self.delay("slow prepare")
        if self.rank == 1 and (self.folder / "unloadable").exists():
            raise BankError(self.folder, "is damaged")
        self.prepared[number] = residency

    async def commit(self, number: int) -> None:
        await self.delay("slow commit")
        self.residency = self.prepared.pop(number)

    async def discard(self, number: int) -> None:
        self.prepared.pop(number, None)

    async def report(self) -> RankReport:
        held = self.residency.held_by(self.rank)
        loads = dict.fromkeys(held, 10 * self.rank + 1)
        return RankReport(len(held), len(self.residency.folders), loads, 1, len(self.live), 0, 0.0, {}, {})

    async def pending(self) -> int:
        return len(self.prepared)

    async def delay(self, flag: str) -> None:
        while (self.folder / flag).exists():
            await asyncio.sleep(0.05)

    async def about(self) -> tuple[int, set[str]]:
        return os.getpid(), self.live

    async def is_prepared(self) -> bool:
        return self.imported

    async def fail(self) -> None:
        self.over.set()

    async def stall(self, seconds: float) -> None:
        self.stalled = seconds


async def over_within(event: asyncio.Event, seconds: float) -> bool:
    """Whether it is set by then."""
    with suppress(TimeoutError):
        return await asyncio.wait_for(event.wait(), seconds)
    return False
