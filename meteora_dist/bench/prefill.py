"""How long one rank takes to read a prompt, by routing mode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from meteora_dist.bench.modes import modes_of
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.moe.routing import RoutingChoice


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """What is measured: one prompt of ``tokens`` in every mode but those that need a batch, ``repeats`` times."""

    tokens: int
    repeats: int

    @property
    def rounds(self) -> int:
        """Runs for one bank in all, the warm-up included."""
        return len(_alone(1)) * (self.repeats + 1)


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """One result: the median time from the request to its first token, and the median ratio of speeds to base."""

    mode: str
    tokens: int
    experts: int
    seconds: float
    of_base: float


async def measure_prefill(config: EngineConfig, plan: PrefillPlan, advance: Callable[[], None]) -> list[PrefillRow]:
    """Measures one engine; modes are interleaved, so that a drifting machine touches them alike."""
    engine = RankEngine(config)
    try:
        experts = engine.routed.num_experts
        modes = _alone(experts)
        times: dict[str, list[float]] = {mode: [] for mode in modes}
        for repeat in range(plan.repeats + 1):
            for mode, choice in modes.items():
                seconds = await _prefill(engine, choice, plan.tokens)
                if repeat:
                    times[mode].append(seconds)
                advance()
    finally:
        engine.stop()
    rows = []
    for mode, found in times.items():
        ratios = [base / seconds for seconds, base in zip(found, times["base"], strict=True)]
        rows.append(PrefillRow(mode, plan.tokens, experts, statistics.median(found), statistics.median(ratios)))
    return rows


async def _prefill(engine: RankEngine, choice: RoutingChoice, tokens: int) -> float:
    prompt = tuple(100 + position % 150 for position in range(tokens))
    started = time.perf_counter()
    async for _ in engine.generate(GenerationRequest("prefill", prompt, 1, routing=choice, ignore_eos=True)):
        pass
    return time.perf_counter() - started


def _alone(experts: int) -> dict[str, RoutingChoice]:
    return {mode: choices[0] for mode, choices in modes_of(experts).items() if mode != "named in turn"}
