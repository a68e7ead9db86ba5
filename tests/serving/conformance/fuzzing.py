"""What holds of every answer to nonsense, and of the service after it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from meteora_dist.engine.rank import RankEngine
from meteora_dist.serving.service import TextService
from tests.serving.conformance.ways import Grpc, Http, Outcome

_INTERNALS = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|panicked at|\.rs:\d|/root/|/home/|/tmp/|/usr/|ray::|object at 0x"
    rf"|{re.escape(str(Path(__file__).parents[3]))}"
    r"|meteora_dist|127\.0\.0\.1|localhost|\b10\.\d+\.\d+\.\d+\b"
)
SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
_PLAIN: dict[str, Any] = {"prompt": "Still there?", "max_tokens": 12, "temperature": 0}
QUESTIONS: tuple[dict[str, Any], ...] = (
    _PLAIN | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    _PLAIN | {"model": "auto-sequence", "logprobs": 2},
    _PLAIN | {"model": "plain:0.5,wide:0.5", "temperature": 1.0, "seed": 5, "n": 2},
    {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 12, "temperature": 1.5, "seed": 9},
    _PLAIN | {"model": "base"},
    _PLAIN,
)
"""Greedy and seeded; the last one leaves no trace in the sampler."""


def leaks_nothing(text: str) -> None:
    """Nothing a caller reads names our code, our files or our hosts."""
    found = _INTERNALS.search(text)
    assert found is None, f"{found.group()!r} in {text[:2000]!r}"


async def replies(ways: Sequence[Http | Grpc]) -> list[Outcome]:
    """The answers to the fixed questions."""
    return [await way.ask(question) for way in (ways[0], ways[3]) for question in QUESTIONS]


async def at_rest(service: TextService, engine: object = None) -> int | float:
    """The cache that is free once nothing is live; nothing is kept either, after the fixed questions."""
    engine = engine or service._engine
    assert isinstance(engine, RankEngine)
    manager = engine._manager
    processor = manager.batch_processor
    assert processor is not None
    scheduler = processor.scheduler
    async with asyncio.timeout(20):
        # The loop takes a step to notice what was cancelled last.
        while scheduler.active_requests or scheduler.waiting_requests:
            await asyncio.sleep(0.01)
    engine.check()
    assert service.admission.live == 0
    assert service.admission.waiting == 0
    assert engine._live == {}
    sampler, keep = manager._sampler, manager._keep
    kept = [sampler.logprobs, sampler.failures, sampler._matchers, keep._shares, keep._sums]
    assert kept == [{}] * len(kept)
    return processor.cache.compute_free_capacity()
