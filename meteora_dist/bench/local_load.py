"""Long load on a service of this machine: errors, how fast it refuses, and whether its memory stays where it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from meteora_cluster.member import free_port
from meteora_dist.bench.load import OK, Call, LoadPlan, send
from meteora_dist.bench.service_processes import ServiceProcesses
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.local import running_service

_SAMPLE_S = 0.5
_RAMP = 0.2
"""Part of the warm-up in which callers begin, one after the other: how a service takes a storm is another question."""
_SPREAD = 0.5
"""Answers of one length would end, and the next requests begin, all in the same step: a storm again."""


@dataclass(frozen=True, slots=True)
class LocalLoadPlan:
    """What is sent.

    Attributes:
        models: Asked in turn.
        streams: Streams at a time: the service's limit.
        knocking: Callers beyond it, who are refused and come back.
        warm_up_s: Seconds of load before memory is compared; pages of the KV cache count from their first use, so it
            should give every stream the time for a whole answer.
        duration_s: Seconds of load after that.
        prompt_tokens: Most words of a prompt; half as many at least.
        answer_tokens: Most tokens of an answer; half as many at least.
    """

    models: tuple[str, ...] = ("auto",)
    streams: int = 64
    knocking: int = 16
    warm_up_s: float = 60.0
    duration_s: float = 60.0
    prompt_tokens: int = 32
    answer_tokens: int = 32

    def load(self, url: str) -> LoadPlan:
        """All of it, warm-up included."""
        return LoadPlan(
            url,
            self.models,
            self.streams + self.knocking,
            requests=None,
            duration_s=self.warm_up_s + self.duration_s,
            prompt_tokens=self.prompt_tokens,
            answer_tokens=self.answer_tokens,
            ignore_eos=True,
            spread=_SPREAD,
            ramp_s=_RAMP * self.warm_up_s,
        )

    def warmed_up(self, calls: Sequence[Call]) -> bool:
        """Whether the warm-up was long enough: as many answers were whole at its end as there are streams."""
        began = min(call.began for call in calls)
        early = [call for call in calls if call.outcome == OK and call.ended - began <= self.warm_up_s]
        return len(early) >= self.streams


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """Resident memory of one part of the service.

    Attributes:
        role: ``replica``, ``rank`` or ``proxy``.
        processes: How many they are.
        start_bytes: Together, after the warm-up.
        highest_bytes: Most since then, up to the end of the load.
        growth: From the one to the other, as a part of the first.
    """

    role: str
    processes: int
    start_bytes: int
    highest_bytes: int
    growth: float


def measure_load(
    config: ServiceConfig, plan: LocalLoadPlan, finished: Callable[[Call], None]
) -> tuple[list[Call], list[MemoryRow]]:
    """Loads a service of its own on this machine.

    Args:
        config: The service; whatever this says, it takes ``plan.streams`` requests at a time, all in one batch, and
            refuses more of them at once.
        plan: What is sent.
        finished: Told of every request.

    Raises:
        EngineUnavailable: The service did not start.
    """
    limits = {"max_live_requests": plan.streams, "max_batch_requests": plan.streams, "max_waiting_requests": 0}
    limited = ServiceConfig.model_validate(config.model_dump() | limits)
    with running_service(limited, free_port(), free_port()) as endpoints:
        return asyncio.run(_watched(plan, f"{endpoints.http}/v1", finished))


async def _watched(
    plan: LocalLoadPlan, url: str, finished: Callable[[Call], None]
) -> tuple[list[Call], list[MemoryRow]]:
    processes = ServiceProcesses.find()
    samples: list[tuple[float, dict[str, int]]] = []

    async def watch() -> None:
        began = time.monotonic()
        while True:
            samples.append((time.monotonic() - began, processes.resident()))
            await asyncio.sleep(_SAMPLE_S)

    watching = asyncio.ensure_future(watch())
    try:
        calls = await send(plan.load(url), finished)
    finally:
        watching.cancel()
    return calls, memory_rows(samples, plan.warm_up_s, {role: len(found) for role, found in processes.found.items()})


def memory_rows(
    samples: Sequence[tuple[float, Mapping[str, int]]], warm_up_s: float, processes: Mapping[str, int]
) -> list[MemoryRow]:
    """Growth of each role, from samples of (seconds since the start, resident bytes) and how many processes it has."""
    counted = [resident for seconds, resident in samples if seconds >= warm_up_s]
    rows = []
    for role, count in processes.items():
        start, highest = counted[0][role], max(resident[role] for resident in counted)
        rows.append(MemoryRow(role, count, start, highest, round(highest / start - 1, 4)))
    return rows
