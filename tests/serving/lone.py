"""Replicas whose only rank is a real engine in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.report import RankReport
from meteora_dist.engine.request import GenerationRequest, Sampling, TokenEvent
from meteora_dist.moe.residency import Residency
from meteora_dist.observability.calls import Observer
from meteora_dist.observability.memory import MemoryRecorder
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.crew import Blueprint
from meteora_dist.serving.experts import ExpertAdmin
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.generations import Generations
from meteora_dist.serving.keys import ANONYMOUS
from meteora_dist.serving.limits import Limits
from meteora_dist.serving.request import TextRequest
from meteora_dist.serving.selection import select
from meteora_dist.serving.service import TextService
from meteora_dist.serving.sharing import Sharing
from meteora_dist.serving.tokenizer import TextTokenizer
from meteora_dist.serving.uses import Uses

POLL_S = 0.02
"""Between two looks at the other replicas."""
CHANGES = count(1)
"""Numbers of the changes that engines are told to make."""


class LoneWorld:
    """A world of one engine in this process."""

    state = "serving"

    def __init__(self, engine: RankEngine, config: ServiceConfig) -> None:
        self.engine, self.residency, self.uses = engine, engine.routed.holdings.residency, Uses()
        self.blueprint = Blueprint(config, self.residency)
        self.changing = asyncio.Lock()

    def check(self) -> None:
        self.engine.check()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        async for event in self.engine.generate(request):
            yield event

    def using(self, generation: int) -> AbstractContextManager[None]:
        return self.uses.of(generation)

    async def unused(self, generation: int) -> None:
        await self.uses.none(generation)

    async def change(self, step: Callable[[Residency], Residency]) -> None:
        async with self.changing:
            then = await asyncio.to_thread(step, self.residency)
            number = next(CHANGES)
            await asyncio.to_thread(self.engine.prepare, number, then)
            await asyncio.to_thread(self.engine.commit, number)
            self.residency = then

    async def reports(self) -> list[RankReport]:
        return [self.engine.report()]


@dataclass
class Replica:
    """One replica as its server sees it."""

    world: LoneWorld
    service: TextService
    sharing: Sharing
    experts: ExpertAdmin
    metrics: MemoryRecorder

    @property
    def names(self) -> tuple[str, ...]:
        return self.service.catalog.experts

    async def ask(self, model: str, tokens: int = 6) -> str:
        """A greedy answer."""
        request = TextRequest(
            ("Who answers?",), model, select(model), max_tokens=tokens, sampling=Sampling(temperature=0)
        )
        prepared = await self.service.prepare(request, ANONYMOUS)
        return "".join([piece.text async for piece in self.service.pieces(prepared)])


@asynccontextmanager
async def lone_replica(
    engine: RankEngine, configured: Path, folder: Path, tokenizer: TextTokenizer, gate: Gate | None = None
) -> AsyncIterator[Replica]:
    """A replica over an engine that serves the newest generation of those in ``folder``."""
    recorder = MemoryRecorder()
    sharing = Sharing(Generations(configured, folder), POLL_S, recorder)
    await sharing.join()
    config = ServiceConfig(model=configured, bank=configured, access="open")
    world: Any = LoneWorld(engine, config)
    bank = engine.routed.holdings.banks[world.residency.roster.newest]
    gate = gate or Gate(None, anonymous=True)
    service = TextService(world, tokenizer, Catalog(bank.manifest), Limits(128), gate, Observer(recorder))
    experts = ExpertAdmin(world, service, sharing.generations, bank)
    sharing.serve(experts)
    yield Replica(world, service, sharing, experts, recorder)
    sharing.stop()
