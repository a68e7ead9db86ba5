"""Tokens per second of decoding on one rank, by routing mode."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.moe.routing import BASE, RoutingChoice, named

PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What is measured: every mode at every batch size, ``repeats`` times, in turn."""

    batches: tuple[int, ...]
    top_k: int
    tokens: int
    repeats: int

    @property
    def modes(self) -> dict[str, RoutingChoice]:
        """The routing of each mode."""
        return {"base": BASE, "named": named(0), "auto": RoutingChoice(top_k=self.top_k)}

    @property
    def rounds(self) -> int:
        """Runs in all, the warm-up of each batch size included."""
        return len(self.batches) * len(self.modes) * (self.repeats + 1)


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One result; ``experts`` is the bank's, ``top_k`` what a token uses, ``tokens_per_s`` the median, all requests."""

    mode: str
    batch: int
    experts: int
    top_k: int
    tokens_per_s: float


async def measure_decode(config: EngineConfig, plan: DecodePlan, advance: Callable[[], None]) -> list[DecodeRow]:
    """Measures one engine; modes are interleaved, so that a drifting machine touches them alike.

    The clock starts when every request has its first token, so prefill does not count.
    """
    engine = RankEngine(config)
    rows = []
    try:
        for batch in plan.batches:
            speeds: dict[str, list[float]] = {mode: [] for mode in plan.modes}
            for repeat in range(plan.repeats + 1):
                for mode, choice in plan.modes.items():
                    speed = await _decode(engine, choice, batch, plan.tokens)
                    if repeat:
                        speeds[mode].append(speed)
                    advance()
            rows += [
                DecodeRow(mode, batch, engine.routed.num_experts, choice.slots, statistics.median(speeds[mode]))
                for mode, choice in plan.modes.items()
            ]
    finally:
        engine.stop()
    return rows


async def _decode(engine: RankEngine, choice: RoutingChoice, batch: int, tokens: int) -> float:
    """Tokens per second of ``batch`` requests from the moment all have their first token."""
    started = asyncio.Barrier(batch)
    times = await asyncio.gather(*(_one(engine, choice, index, tokens, started) for index in range(batch)))
    counted = sum(count for _, _, count in times)
    return counted / (max(last for _, last, _ in times) - min(first for first, _, _ in times))


async def _one(
    engine: RankEngine, choice: RoutingChoice, index: int, tokens: int, started: asyncio.Barrier
) -> tuple[float, float, int]:
    """When the clock started for one request, when it ended, and the tokens in between."""
    prompt = tuple(100 + index + position for position in range(PROMPT_TOKENS))
    request = GenerationRequest(f"bench-{index}", prompt, tokens, routing=choice, ignore_eos=True)
    stream = engine.generate(request)
    await anext(stream)
    await started.wait()
    first, count = time.perf_counter(), 0
    async for _ in stream:
        count += 1
    return first, time.perf_counter(), count
