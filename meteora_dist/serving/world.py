"""The ranks as their replica sees them: one engine that is there, or is not."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup

from meteora_cluster.group import ActorGroup
from meteora_dist.engine.request import GenerationRequest, TokenEvent
from meteora_dist.errors import EngineUnavailable, MeteoraError
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.ranks import RankActor

logger = logging.getLogger(__name__)

_SPARE_CALLS = 16
"""Calls a rank serves beside requests: starting, watching."""
_CAUSE_S = 5.0


class World:
    """All ranks of one engine. A request runs on the rank with the fewest live ones.

    The ranks step together, so one that dies takes the world with it: every live request then ends with
    EngineUnavailable, and so does every later one.

    Attributes:
        failure: What ended the world, for the operator; None while it lives.
    """

    def __init__(self, group: ActorGroup) -> None:
        self._group = group
        self._actors = group.actors
        self._live = [0] * len(group.actors)
        self.failure: str | None = None
        self._watch = asyncio.ensure_future(self._watch_ranks())

    @classmethod
    async def launch(cls, config: ServiceConfig, placement: PlacementGroup | None = None) -> World:
        """Starts the ranks, and returns once each has produced a token.

        Args:
            config: The service's configuration.
            placement: Where they live, beside the calling process in bundle 0; None makes a placement of their own.

        Raises:
            ClusterError: No room, or a rank failed to start; the message carries the rank's own words.
            EngineUnavailable: A rank started, but cannot generate.
        """
        group = await ActorGroup.launch(
            RankActor,
            [(config, rank) for rank in range(config.mesh.size)],
            config.rank,
            placement=placement,
            driver=None if placement is None else config.replica,
            timeout_s=config.start_timeout_s,
            max_concurrency=config.max_live_requests + _SPARE_CALLS,
        )
        world = cls(group)
        await world._warm_up()
        return world

    def check(self) -> None:
        """Raises EngineUnavailable when a rank has been lost."""
        if self.failure is not None:
            raise EngineUnavailable("the engine has lost a rank and is being restarted: try again soon")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yields the request's tokens as its rank produces them; closing the generator cancels it there.

        Raises:
            EngineUnavailable: A rank has died, before or while the request ran.
        """
        self.check()
        async with aclosing(self._generate_on(self._live.index(min(self._live)), request)) as events:
            async for event in events:
                yield event

    def stop(self) -> None:
        """Ends every rank; live requests end with EngineUnavailable."""
        self.failure = self.failure or "it was stopped"
        self._watch.cancel()
        self._group.stop()

    async def _generate_on(self, rank: int, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        self._live[rank] += 1
        stream: Any = self._actors[rank].generate.remote(request)
        finished = False
        try:
            async for ref in stream:
                event: TokenEvent = await ref
                finished = event.finish_reason is not None
                yield event
        except RayActorError:
            finished = True
            raise EngineUnavailable("the engine lost a rank while it answered: try again soon") from None
        except RayTaskError as error:
            finished = True
            raise _own(error) from None
        finally:
            self._live[rank] -= 1
            if not finished:
                ray.cancel(stream)

    async def _warm_up(self) -> None:
        try:
            await asyncio.gather(*(self._first_token(rank) for rank in range(len(self._actors))))
        except EngineUnavailable as error:
            # The watch is about to learn the cause.
            await asyncio.wait([self._watch], timeout=_CAUSE_S)
            why = self.failure or str(error)
            self.stop()
            raise EngineUnavailable(f"the ranks started, but cannot generate: {why}") from None

    async def _first_token(self, rank: int) -> None:
        async for _ in self._generate_on(rank, GenerationRequest(f"warm-up-{rank}", (0,), max_tokens=1)):
            pass

    async def _watch_ranks(self) -> None:
        failed = await self._group.watch()
        self.failure = str(failed)
        logger.error("the world is gone: %s", failed)
        # The others wait for the lost rank in their next exchange; ending them ends their requests at once.
        self._group.stop()


def _own(error: RayTaskError) -> Exception:
    cause = error.cause
    return cause if isinstance(cause, MeteoraError) else RuntimeError(f"a rank failed to answer: {cause!r}")
