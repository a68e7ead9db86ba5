"""One life of the ranks: from their launch to the first loss, or to a stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import PlacementGroup

from meteora_cluster.actors import create
from meteora_cluster.group import ActorGroup
from meteora_cluster.placement import Resources
from meteora_cluster.standby import Standby
from meteora_cluster.waiting import value
from meteora_dist.engine.report import RankReport
from meteora_dist.engine.request import GenerationRequest, TokenEvent
from meteora_dist.errors import EngineUnavailable, MeteoraError
from meteora_dist.moe.residency import Residency
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.ranks import RankActor

_SPARE_CALLS = 16
"""Calls a rank serves beside requests: starting, watching, answering questions."""
_LAST_WORDS_S = 0.2
"""How long other ranks may still speak after the first: a death is often noticed by a neighbour first."""
_LEAVE_S = 3.0
"""How long the ranks of a crew that is lost have to leave it, if they are to be of the next one."""
_NOBODY: Mapping[int, ActorHandle[Any]] = MappingProxyType({})


class RankLost(Exception):
    """The crew has lost a rank, and with it the rest of this answer; never leaves ``World``."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What a crew is launched from.

    Attributes:
        config: The service's configuration.
        residency: What the ranks start with.
        placement: Where the ranks live, beside the calling process in bundle 0; None makes a placement of their own.
        member: The class of the ranks.
    """

    config: ServiceConfig
    residency: Residency
    placement: PlacementGroup | None = None
    member: type[RankActor] = RankActor

    @property
    def arguments(self) -> list[tuple[ServiceConfig, int, Residency]]:
        """Constructor arguments of each rank."""
        return [(self.config, rank, self.residency) for rank in range(self.config.mesh.size)]

    @property
    def max_concurrency(self) -> int:
        """Calls one rank serves at a time."""
        return self.config.max_live_requests + _SPARE_CALLS

    def standby(self) -> Standby:
        """Seats beside the ranks: none, unless they are configured and have a lasting place."""
        placement, arguments = self.placement, self.arguments
        if not self.config.standby or placement is None:
            return Standby(lambda _: {}, {})

        def create_at(seats: Collection[int]) -> Mapping[int, ActorHandle[Any]]:
            own = {seat: arguments[seat] for seat in seats}
            return create(self.member, own, Resources(), placement, self.max_concurrency)

        return Standby.beside(placement, create_at)


class Crew:
    """All ranks of one engine. They step together, so one that is lost takes the others with it.

    A request runs on the group of ranks with the fewest live ones.

    Attributes:
        produced: Tokens of requests so far.
    """

    def __init__(self, group: ActorGroup, blueprint: Blueprint) -> None:
        mesh = blueprint.config.mesh
        self.produced = 0
        self._group = group
        # Only the first rank of a tensor-parallel group takes requests; the others follow it.
        self._drivers = [rank for rank in range(mesh.size) if mesh.tp_rank(rank) == 0]
        self._actors = group.actors
        self._lasting = blueprint.placement is not None
        self._live = dict.fromkeys(self._drivers, 0)
        self._changes = 0
        self._causes: dict[int, str] = {}
        self._lost = asyncio.Event()
        self._watch = asyncio.ensure_future(self._watch_ranks(blueprint.config))

    @classmethod
    async def launch(cls, blueprint: Blueprint, actors: Mapping[int, ActorHandle[Any]] = _NOBODY) -> Crew:
        """Starts the ranks, and returns once each group of them has produced a token.

        Args:
            blueprint: What from.
            actors: Those that become ranks, by rank; the others are new.

        Raises:
            ClusterError: No room, or a rank failed to start; the message carries the rank's own words.
            EngineUnavailable: The ranks started, but cannot generate.
        """
        config, placement = blueprint.config, blueprint.placement
        group = await ActorGroup.launch(
            blueprint.member,
            blueprint.arguments,
            config.rank,
            placement=placement,
            driver=None if placement is None else config.replica,
            timeout_s=config.start_timeout_s,
            max_concurrency=blueprint.max_concurrency,
            actors=actors,
            heartbeat=config.starting_heartbeat,
        )
        crew = cls(group, blueprint)
        try:
            await crew._warm_up(config.start_timeout_s)
        except BaseException:
            crew.stop()
            raise
        crew.produced = 0
        return crew

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yields the request's tokens as they are produced; closing the generator cancels the request.

        Raises:
            RankLost: A rank was lost, before or while the request ran.
            InvalidRequest: The engine refuses the request.
        """
        driver = min(self._live, key=self._live.__getitem__)
        self._live[driver] += 1
        stream: Any = self._actors[driver].generate.remote(request)
        over = False
        try:
            async for ref in stream:
                event: TokenEvent = await ref
                over = event.finish_reason is not None
                self.produced += 1
                yield event
            if not over:
                raise self._lose({driver: "it ended an answer before its last token"})
        except RayTaskError as error:
            over = True
            raise self._own(driver, error) from None
        except RayError:
            over = True
            raise self._lose({driver: "its process ended"}) from None
        finally:
            self._live[driver] -= 1
            if not over:
                ray.cancel(stream)

    async def prepare(self, residency: Residency) -> int:
        """Lets every rank load what it lacks of ``residency``, and returns the number to commit it by.

        When one of them cannot, all forget it again. A residency is prepared after the one before is in force.

        Raises:
            RankLost: A rank was lost.
            CheckpointError: A bank cannot be read, or does not fit, in the words of the first rank that says so.
        """
        self._changes += 1
        number = self._changes
        outcomes = await self._ask_all(lambda actor: actor.prepare.remote(number, residency))
        if failures := [outcome for outcome in outcomes if isinstance(outcome, Exception)]:
            await self._ask_all(lambda actor: actor.discard.remote(number))
            raise failures[0]
        return number

    async def commit(self, number: int) -> None:
        """Puts what was prepared in force on all ranks, and returns when it is; raises RankLost."""
        await self._ask_all(lambda actor: actor.commit.remote(number))

    async def reports(self) -> list[RankReport]:
        """What each rank says of itself; raises RankLost."""
        return await self._ask_all(lambda actor: actor.report.remote())

    async def end(self) -> str:
        """Waits until a rank is lost, and returns why, in the ranks' own words."""
        await self._lost.wait()
        await asyncio.wait([self._watch], timeout=_LAST_WORDS_S)
        return "; ".join(f"rank {rank}: {cause}" for rank, cause in sorted(self._causes.items()))

    def stop(self) -> None:
        """Ends every rank; live requests end with RankLost. Does nothing the second time."""
        self._watch.cancel()
        self._lose({})
        self._group.stop()

    async def dissolve(self) -> dict[int, ActorHandle[Any]]:
        """Ends a lost crew; returns those of its actors that can be of the next one, by rank.

        Raising once is no reason to be left behind. Dying is, and so is silence, or a crew that has produced nothing:
        its ranks may be the reason. And no placement of a crew's own outlives it.
        """
        if not self.produced or not self._lasting:
            self.stop()
            return {}
        self._watch.cancel()
        return await self._group.dissolve(_LEAVE_S)

    async def _warm_up(self, timeout_s: float) -> None:
        try:
            await asyncio.wait_for(asyncio.gather(*map(self._first_token, self._drivers)), timeout_s)
        except TimeoutError:
            raise EngineUnavailable(f"the ranks started, but produced no token within {timeout_s:.0f} s") from None
        except RankLost:
            raise EngineUnavailable(f"the ranks started, but cannot generate: {await self.end()}") from None

    async def _first_token(self, driver: int) -> None:
        # The one with the fewest requests is next, so that each gets one.
        async for _ in self.generate(GenerationRequest(f"warm-up-{driver}", (0,), max_tokens=1)):
            pass

    async def _watch_ranks(self, config: ServiceConfig) -> None:
        failed = await self._group.watch(config.heartbeat)
        self._lose(failed.reasons)

    async def _ask_all(self, question: Callable[[Any], Any]) -> list[Any]:
        """What every rank answers, or the error it raises, once all have spoken; raises RankLost when one is lost."""
        answers = [asyncio.ensure_future(value(question(actor))) for actor in self._actors]
        all_answers = asyncio.ensure_future(asyncio.wait(answers))
        lost = asyncio.ensure_future(self._lost.wait())
        try:
            await asyncio.wait([all_answers, lost], return_when=asyncio.FIRST_COMPLETED)
            if self._lost.is_set():
                raise RankLost
            outcomes = [self._outcome(rank, answer) for rank, answer in enumerate(answers)]
        finally:
            for task in [*answers, all_answers, lost]:
                task.cancel()
        if any(isinstance(outcome, RankLost) for outcome in outcomes):
            raise RankLost
        return outcomes

    def _outcome(self, rank: int, answer: asyncio.Task[Any]) -> Any:
        error = answer.exception()
        if error is None:
            return answer.result()
        return self._own(rank, error) if isinstance(error, RayTaskError) else self._lose({rank: "its process ended"})

    def _own(self, driver: int, error: RayTaskError) -> Exception:
        """What a rank's error means here; one that cannot go on with a request is as good as lost."""
        cause = error.cause
        if isinstance(cause, EngineUnavailable):
            return self._lose({driver: str(cause)})
        return cause if isinstance(cause, MeteoraError) else RuntimeError(f"a rank failed to answer: {cause!r}")

    def _lose(self, causes: dict[int, str]) -> RankLost:
        self._causes = causes | self._causes
        self._lost.set()
        return RankLost()
