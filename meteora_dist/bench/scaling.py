"""What it costs to spread one machine's cores over two ranks: their throughput against one rank with all threads."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from meteora_dist.bench.processes import rank_processes
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.errors import EngineUnavailable

PROMPT_TOKENS = 16


@dataclass(frozen=True, slots=True)
class ScalingPlan:
    """What is measured: ``requests`` at once, routed by the gates, ``repeats`` times on each world, in turn."""

    model: Path
    bank: Path
    requests: int
    tokens: int
    repeats: int

    @property
    def worlds(self) -> tuple[EngineConfig, EngineConfig]:
        """One rank with two threads, and two ranks with one thread each."""
        return (
            EngineConfig(model=self.model, bank=self.bank, threads=2),
            EngineConfig(model=self.model, bank=self.bank, ep=2, threads=1),
        )

    @property
    def rounds(self) -> int:
        """Runs in all, the warm-up of each world included."""
        return len(self.worlds) * (self.repeats + 1)


@dataclass(frozen=True, slots=True)
class ScalingRow:
    """One world; medians. ``exchange_share`` is the share of a rank's time in exchanges, waiting included."""

    ep: int
    threads: int
    requests: int
    tokens_per_s: float
    exchange_share: float


def measure_scaling(plan: ScalingPlan, advance: Callable[[], None]) -> list[ScalingRow]:
    """Measures both worlds, which live side by side; the one that is not measured sleeps.

    The clock runs from the first request to the last token, prefill of short prompts included.

    Raises:
        EngineUnavailable: A rank failed.
    """
    one, two = plan.worlds
    with rank_processes(one, _rank) as alone, rank_processes(two, _rank) as both:
        worlds = [(one, alone), (two, both)]
        for _, pipes in worlds:
            for pipe in pipes:
                _receive(pipe)
        samples: dict[int, list[tuple[float, float]]] = {config.ep: [] for config, _ in worlds}
        for repeat in range(plan.repeats + 1):
            for config, pipes in worlds:
                sample = _round(plan, pipes)
                if repeat:
                    samples[config.ep].append(sample)
                advance()
    return [
        ScalingRow(
            config.ep,
            config.threads,
            plan.requests,
            *(statistics.median(values) for values in zip(*samples[config.ep], strict=True)),
        )
        for config in (one, two)
    ]


def _round(plan: ScalingPlan, pipes: list[Connection]) -> tuple[float, float]:
    """Tokens per second of all requests together, and the ranks' mean share of time in exchanges."""
    requests = [
        GenerationRequest(
            f"bench-{index}", tuple(range(100 + index, 100 + index + PROMPT_TOKENS)), plan.tokens, ignore_eos=True
        )
        for index in range(plan.requests)
    ]
    started = time.perf_counter()
    for rank, pipe in enumerate(pipes):
        pipe.send(requests[rank :: len(pipes)])
    answers = [_receive(pipe) for pipe in pipes]
    seconds = time.perf_counter() - started
    produced = sum(tokens for tokens, _ in answers)
    return produced / seconds, statistics.mean(exchanged for _, exchanged in answers) / seconds


def _receive(pipe: Connection) -> tuple[int, float]:
    try:
        answer: tuple[int, float] = pipe.recv()
    except EOFError:
        raise EngineUnavailable("a rank of the benchmark died; its own words are above") from None
    return answer


def _rank(config: EngineConfig, rank: int, rendezvous: str | None, pipe: Connection) -> None:
    """Answers the requests that come through the pipe: tokens produced and seconds in exchanges; first, zeros."""
    engine = RankEngine(config, rank, rendezvous)
    pipe.send((0, 0.0))
    with suppress(EOFError):
        while True:
            requests = pipe.recv()
            before = engine.routed.wire.seconds
            produced = asyncio.run(_answer(engine, requests))
            pipe.send((produced, engine.routed.wire.seconds - before))
    engine.stop()


async def _answer(engine: RankEngine, requests: list[GenerationRequest]) -> int:
    async def one(request: GenerationRequest) -> int:
        return len([event async for event in engine.generate(request)])

    return sum(await asyncio.gather(*map(one, requests)))
