"""What serving costs: streams over HTTP against the same engine asked in its own process."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from meteora_cluster.member import free_port
from meteora_dist.bank import Bank
from meteora_dist.bench.findable import FindableRank, ranks
from meteora_dist.bench.load import OK, LoadPlan, send
from meteora_dist.bench.load_report import report
from meteora_dist.bench.service_processes import ServiceProcesses
from meteora_dist.engine.request import GenerationRequest
from meteora_dist.errors import EngineUnavailable
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.local import running_service
from meteora_dist.serving.ranks import RankActor
from meteora_dist.serving.selection import select
from meteora_dist.serving.server import Server
from meteora_dist.serving.tokenizer import TextTokenizer


class MeasuredRank(FindableRank):
    """A rank that can be asked for the speed of its engine."""

    async def own_speed(self, requests: list[GenerationRequest]) -> float:
        """Tokens per second of requests that start together, from the start to the last token."""
        engine = self._running()

        async def count(request: GenerationRequest) -> int:
            return sum([1 async for _ in engine.generate(request)])

        began = time.perf_counter()
        tokens = sum(await asyncio.gather(*map(count, requests)))
        return tokens / (time.perf_counter() - began)


class MeasuredServer(Server):
    """A replica with such ranks."""

    member: ClassVar[type[RankActor]] = MeasuredRank


@dataclass(frozen=True, slots=True)
class FrontendPlan:
    """What is measured: the engine, and streams over HTTP, ``repeats`` times in turn.

    Attributes:
        model: As a request names it.
        streams: Requests that start together.
        prompt_tokens: Words of a prompt.
        tokens: Tokens of an answer.
        repeats: Rounds, after one that does not count.
    """

    model: str = "auto"
    streams: int = 8
    prompt_tokens: int = 16
    tokens: int = 64
    repeats: int = 5

    def load(self, url: str, number: int) -> LoadPlan:
        """The ``number``-th round over HTTP."""
        return LoadPlan(
            url,
            (self.model,),
            self.streams,
            requests=self.streams,
            prompt_tokens=self.prompt_tokens,
            answer_tokens=self.tokens,
            ignore_eos=True,
            seed=number,
        )


@dataclass(frozen=True, slots=True)
class FrontendRow:
    """One result.

    Attributes:
        way: ``engine`` or ``http``.
        streams: Requests at a time.
        tokens_per_s: The median of all rounds, prefill included.
        of_engine: That, divided by the engine's.
        cpu_ms_per_token: Milliseconds of a core a token by process: rank, replica, proxy, caller.
    """

    way: str
    streams: int
    tokens_per_s: float
    of_engine: float
    cpu_ms_per_token: dict[str, float]


def measure_frontend(config: ServiceConfig, plan: FrontendPlan, advance: Callable[[], None]) -> list[FrontendRow]:
    """Measures a service of its own on this machine; both ways ask the same rank, with the same prompts.

    The engine is asked by a method of its rank, in the rank's process, while the rest of the service idles: what HTTP
    adds is the way of every token through Ray, the replica, Serve's proxy and the caller's own work, which run beside
    the rank. All of them share the machine's cores.

    Args:
        config: The service, of one rank.
        plan: What is measured.
        advance: Told of every round of either way.

    Raises:
        EngineUnavailable: The service did not start, or an answer failed.
    """
    with running_service(config, free_port(), free_port(), server=MeasuredServer) as endpoints:
        return asyncio.run(_rounds(config, plan, f"{endpoints.http}/v1", advance))


async def _rounds(
    config: ServiceConfig, plan: FrontendPlan, url: str, advance: Callable[[], None]
) -> list[FrontendRow]:
    (rank,) = await ranks()
    processes = ServiceProcesses.find()
    tokenizer, catalog = TextTokenizer.open(config.model), Catalog(Bank.open(config.bank).manifest)

    async def engine(number: int) -> float:
        load = plan.load(url, number)
        requests = [_request(load, tokenizer, catalog, number, index) for index in range(plan.streams)]
        speed: float = await rank.actor.own_speed.remote(requests)
        return speed

    async def http(number: int) -> float:
        calls = await send(plan.load(url, number))
        if failed := [call for call in calls if call.outcome != OK]:
            raise EngineUnavailable(f"a request failed: {failed[0].outcome} {failed[0].detail}")
        return report(calls)[0].tokens_per_s

    ways = {"engine": engine, "http": http}
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    used: dict[str, dict[str, float]] = {way: {} for way in ways}
    for number in range(plan.repeats + 1):
        for way, measure in ways.items():
            before = processes.cpu_s()
            speed = await measure(number)
            if number:
                speeds[way].append(speed)
                spent = {role: now - before[role] for role, now in processes.cpu_s().items()}
                used[way] = {role: used[way].get(role, 0.0) + more for role, more in spent.items()}
            advance()
    tokens = plan.streams * plan.tokens * plan.repeats
    medians = {way: statistics.median(found) for way, found in speeds.items()}
    return [
        FrontendRow(
            way,
            plan.streams,
            round(medians[way], 2),
            round(medians[way] / medians["engine"], 4),
            {role: round(1000 * seconds / tokens, 3) for role, seconds in used[way].items()},
        )
        for way in ways
    ]


def _request(load: LoadPlan, tokenizer: TextTokenizer, catalog: Catalog, number: int, index: int) -> GenerationRequest:
    """What the service makes of the round's ``index``-th request."""
    body = load.body(index)
    return GenerationRequest(
        f"own-{number}-{index}",
        tokenizer.encode(body["prompt"]),
        load.answer_tokens,
        routing=catalog.routing(select(body["model"])),
        ignore_eos=True,
    )
