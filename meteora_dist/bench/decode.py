"""Tokens per second of decoding on one rank, by routing mode."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from meteora_dist.bench.memory import peak_resident, reset_peak
from meteora_dist.bench.modes import Mode, modes_of
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.moe.routing import RoutingChoice

PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """What is measured: every mode at every batch size, ``repeats`` times, in turn."""

    batches: tuple[int, ...]
    tokens: int
    repeats: int

    @property
    def rounds(self) -> int:
        """Runs for one bank in all, the warm-up of each batch size included."""
        return len(self.batches) * len(modes_of(1)) * (self.repeats + 1)


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One result.

    Attributes:
        mode: See ``meteora_dist.bench.modes``.
        batch: Requests at once.
        experts: Of the bank.
        tokens_per_s: Of all requests together, the median of the rounds.
        of_base: The median of the rounds' ratios to the base mode.
        peak_bytes: Largest resident memory of the process while this batch size was measured, all modes.
    """

    mode: str
    batch: int
    experts: int
    tokens_per_s: float
    of_base: float
    peak_bytes: int


async def measure_decode(config: EngineConfig, plan: DecodePlan, advance: Callable[[], None]) -> list[DecodeRow]:
    """Measures one engine; modes are interleaved, so that a drifting machine touches them alike. Linux only.

    The clock starts when every request has its first token, so prefill does not count.
    """
    engine = RankEngine(config)
    rows = []
    try:
        experts = engine.routed.num_experts
        for batch in plan.batches:
            modes = modes_of(experts)
            speeds: dict[str, list[float]] = {mode: [] for mode in modes}
            reset_peak()
            for repeat in range(plan.repeats + 1):
                for mode, choices in modes.items():
                    speed = await _decode(engine, choices, batch, plan.tokens)
                    if repeat:
                        speeds[mode].append(speed)
                    advance()
            peak = peak_resident()
            for mode, found in speeds.items():
                ratios = [speed / base for speed, base in zip(found, speeds["base"], strict=True)]
                median, ratio = statistics.median(found), statistics.median(ratios)
                rows.append(DecodeRow(mode, batch, experts, median, ratio, peak))
    finally:
        engine.stop()
    return rows


async def _decode(engine: RankEngine, choices: Mode, batch: int, tokens: int) -> float:
    """Tokens per second of ``batch`` requests from the moment all have their first token."""
    started = asyncio.Barrier(batch)
    requests = [_one(engine, choices[index % len(choices)], index, tokens, started) for index in range(batch)]
    times = await asyncio.gather(*requests)
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
