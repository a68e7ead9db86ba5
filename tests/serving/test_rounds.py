"""Rounds over ranks that answer, are lost, or say nothing."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from meteora_dist.bank import Bank
from meteora_dist.engine.mesh import Mesh
from meteora_dist.engine.report import RankReport
from meteora_dist.errors import EngineUnavailable
from meteora_dist.moe.residency import Residency
from meteora_dist.observability import metrics
from meteora_dist.observability.calls import Observer
from meteora_dist.observability.memory import MemoryRecorder
from meteora_dist.observability.ranks import Losses, RankMeter, Serving
from meteora_dist.serving.rounds import Rounds

REPORT = RankReport(1000, 10, {}, 1, 1, 0, 0.5, {"dispatch": 8}, {"dispatch": 0.5})


@dataclass
class Ranks:
    """Stands in for a world; says the outcomes one after the other, and the last one for ever."""

    outcomes: list[Any]
    state: str = "serving"
    losses: Losses = field(default_factory=Losses)
    asked: int = 0

    async def reports(self) -> list[RankReport]:
        self.asked += 1
        outcome = self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0]
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is None:
            await asyncio.sleep(60)
        return [outcome]


def rounds(ranks: Any, bank: Bank, interval_s: float = 0.01) -> tuple[Rounds, MemoryRecorder]:
    record = MemoryRecorder()
    serving = Serving(bank.manifest, 9, Residency.of(bank, 1))
    meter = RankMeter(record, Mesh(), 9)
    service: Any = SimpleNamespace(observer=Observer(record), admission=SimpleNamespace(waiting=3), missing=None)
    return Rounds(ranks, service, meter, lambda: serving, interval_s), record


async def test_a_round_writes_what_the_ranks_say(tiny_bank: Bank) -> None:
    ranks = Ranks([REPORT])
    going, record = rounds(ranks, tiny_bank)
    await going.one()
    assert record.value(metrics.READY) == 1
    assert (record.value(metrics.LIVE_REQUESTS), record.value(metrics.WAITING_REQUESTS)) == (0, 3)
    assert record.value(metrics.KV_CACHE_USED, rank="0") == 0.5
    assert record.value(metrics.BANK_GENERATION) == tiny_bank.manifest.generation
    ranks.state, ranks.losses = "rebuilding", Losses(lost=1)
    await going.one()
    assert (record.value(metrics.READY), record.value(metrics.RANK_LOSSES)) == (0, 1)


async def test_a_replica_that_cannot_load_the_newest_generation_is_not_ready(tiny_bank: Bank) -> None:
    going, record = rounds(Ranks([REPORT]), tiny_bank)
    going._service.missing = 9
    await going.one()
    assert record.value(metrics.READY) == 0
    assert (record.value(metrics.BANK_GENERATION), record.value(metrics.BANK_NEWEST_GENERATION)) == (1, 9)


@pytest.mark.parametrize("trouble", [EngineUnavailable("lost"), None, RuntimeError("a bug")])
async def test_rounds_go_on_whatever_happens(tiny_bank: Bank, trouble: Any) -> None:
    ranks = Ranks([trouble, REPORT])
    going, record = rounds(ranks, tiny_bank)
    going.start()
    async with asyncio.timeout(5):
        while record.value(metrics.KV_CACHE_USED, rank="0") is None:
            await asyncio.sleep(0.01)
    assert ranks.asked > 1
