"""The engine as its replica sees it: ranks that may be lost, and requests that are not."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, ExitStack, aclosing
from dataclasses import replace
from typing import Any, Literal

from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from meteora_dist.engine.report import RankReport
from meteora_dist.engine.request import GenerationRequest, TokenEvent
from meteora_dist.errors import EngineUnavailable
from meteora_dist.moe.residency import Residency
from meteora_dist.observability.ranks import Losses
from meteora_dist.serving.background import Background
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.crew import Blueprint, Crew, RankLost
from meteora_dist.serving.ranks import RankActor
from meteora_dist.serving.uses import Uses

logger = logging.getLogger(__name__)

State = Literal["serving", "rebuilding", "failed"]


class World:
    """A crew of ranks, and another one in its place when it is lost.

    It keeps what each live request has produced: after a rebuild they all go on from there, with the very tokens they
    would have had. When rebuilds bring no token back, the world fails for good.

    Attributes:
        blueprint: What the next crew is launched from; its residency is replaced when a change of it is decided.
        residency: What the ranks hold, every one of them.
        failure: Why the world has failed, for the operator; None while it serves or is being rebuilt.
        losses: What became of its ranks so far.
    """

    def __init__(self, crew: Crew, blueprint: Blueprint) -> None:
        self.blueprint = blueprint
        self.residency = blueprint.residency
        self._uses: Uses[int] = Uses()
        self._behind: Uses[asyncio.Future[Crew]] = Uses()
        self._changing = asyncio.Lock()
        self._background = Background()
        self._standby = blueprint.standby()
        self.failure: str | None = None
        self.losses = Losses()
        self._crew: asyncio.Future[Crew] = asyncio.get_running_loop().create_future()
        self._crew.set_result(crew)
        self._keeper = asyncio.ensure_future(self._keep(crew))

    @classmethod
    async def launch(
        cls,
        config: ServiceConfig,
        residency: Residency,
        placement: PlacementGroup | None = None,
        member: type[RankActor] = RankActor,
    ) -> World:
        """Starts the ranks, and returns once all are ready.

        Args:
            config: The service's configuration.
            residency: What the ranks start with.
            placement: Where they live, beside the calling process in bundle 0; None makes a placement of their own.
            member: The class of the ranks.

        Raises:
            ClusterError: No room, or a rank failed to start; the message carries the rank's own words.
            EngineUnavailable: The ranks started, but cannot generate.
        """
        blueprint = Blueprint(config, residency, placement, member)
        return cls(await Crew.launch(blueprint), blueprint)

    @property
    def state(self) -> State:
        """Whether requests are answered, wait for new ranks, or are refused."""
        if self.failure is not None:
            return "failed"
        return "serving" if self._crew.done() else "rebuilding"

    def check(self) -> None:
        """Raises EngineUnavailable unless requests are answered right now."""
        if self.state == "failed":
            raise EngineUnavailable("the engine could not be rebuilt, and is being replaced: try again soon")
        if self.state == "rebuilding":
            raise EngineUnavailable("the engine has lost a rank, and is being rebuilt: try again soon")

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yields the request's tokens, across rebuilds; closing the generator cancels it.

        One that names no bank generation uses the newest that the ranks hold now, to its end.

        Raises:
            InvalidRequest: The engine refuses the request.
            EngineUnavailable: The world has failed; or it is being rebuilt, and was not back within ``rebuild_wait_s``
                for a new request; or it was lost again and again without producing a token of this request.
        """
        generation = request.generation or self.residency.roster.newest
        request = replace(request, generation=generation)
        with self.using(generation):
            async with aclosing(self._across_rebuilds(request)) as events:
                async for event in events:
                    yield event

    async def change(self, step: Callable[[Residency], Residency]) -> None:
        """Changes what the ranks hold, while requests run: all ranks, or none. Changes are made one after another.

        Every rank loads what it lacks beside what it holds; then the change is decided, and all ranks switch between
        two passes. When a rank is lost before the decision, the next crew starts with what was held before; after it,
        with what is decided. The change is made even if the caller is cancelled.

        Args:
            step: Makes the next residency of the one in force, in another thread. It may drop a generation only after
                ``unused`` has returned for it, and nobody starts requests with it any more.

        Raises:
            CheckpointError: A rank cannot load a bank; nothing has changed.
            EngineUnavailable: A rank was lost before the decision, and nothing has changed; or the world has failed.
        """
        await self._background.finish(self._change(step))

    def using(self, generation: int) -> AbstractContextManager[None]:
        """Keeps a bank generation from being ``unused`` for as long as the block runs."""
        return self._uses.of(generation)

    async def unused(self, generation: int) -> None:
        """Returns once no live request uses a bank generation, and nobody keeps it."""
        await self._uses.none(generation)

    async def reports(self) -> list[RankReport]:
        """What each rank says of itself, in rank order; raises EngineUnavailable."""
        crew = await self._serving(self.blueprint.config.rebuild_wait_s)
        try:
            return await crew.reports()
        except RankLost:
            self._leave(crew)
            raise EngineUnavailable("the engine has lost a rank, and is being rebuilt: try again soon") from None

    async def _change(self, step: Callable[[Residency], Residency]) -> None:
        async with self._changing:
            then = await asyncio.to_thread(step, self.residency)
            if then == self.residency:
                return
            crew = await self._serving(self.blueprint.config.rebuild_wait_s)
            try:
                number = await crew.prepare(then)
                self._decide(crew, then)
            except RankLost:
                self._leave(crew)
                raise EngineUnavailable(
                    "the engine has lost a rank while it prepared this change, which is not made: try again soon"
                ) from None
            try:
                await crew.commit(number)
            except RankLost:
                self._leave(crew)
                await self._serving(None)
            self.residency = then

    def _decide(self, crew: Crew, residency: Residency) -> None:
        """From now on every crew starts with ``residency``; raises RankLost when the next one may be starting."""
        if self.state != "serving" or self._crew.result() is not crew:
            raise RankLost
        self.blueprint = replace(self.blueprint, residency=residency)

    async def _across_rebuilds(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        tokens: list[int] = []
        losses = 0
        wait_s: float | None = self.blueprint.config.rebuild_wait_s
        with ExitStack() as behind:
            while losses <= self.blueprint.config.max_rebuilds:
                if losses or not self._crew.done():
                    behind.enter_context(self._behind.of(self._crew))
                crew = await self._serving(wait_s)
                try:
                    async with aclosing(crew.generate(request.after(tokens))) as events:
                        async for event in events:
                            tokens.append(event.token_id)
                            losses = 0
                            behind.close()
                            yield event
                    return
                except RankLost:
                    # Whoever notices first opens the rebuild, so that nobody asks this crew again.
                    self._leave(crew)
                    losses, wait_s = losses + 1, None
                    behind.close()
        raise EngineUnavailable(f"the engine was lost {losses} times while it worked on this request: try again later")

    def stop(self) -> None:
        """Ends every rank; live requests end with EngineUnavailable. Does nothing the second time."""
        self._keeper.cancel()
        self._standby.stop()
        if self.state == "serving":
            self._crew.result().stop()
        self._fail("it was stopped")

    async def _serving(self, wait_s: float | None) -> Crew:
        """The crew that serves; while there is none, the next one, unless that takes longer than ``wait_s``."""
        if self.state == "failed":
            self.check()
        try:
            async with asyncio.timeout(wait_s):
                return await asyncio.shield(self._crew)
        except TimeoutError:
            raise EngineUnavailable(
                f"the engine is being rebuilt, and was not back within {wait_s:g} s: try again soon"
            ) from None

    async def _keep(self, crew: Crew) -> None:
        """Replaces lost crews until that no longer helps."""
        try:
            await self._replace(crew)
        except Exception as error:
            logger.exception("the world has failed")
            self._fail(str(error))

    async def _replace(self, crew: Crew) -> None:
        fruitless = 0
        while True:
            cause = await self._end_of(crew)
            lost = time.monotonic()
            self._count(lost=1)
            self._leave(crew)
            logger.error("ranks are lost, and are replaced: %s", cause)
            fruitless = 0 if crew.produced else fruitless
            crew, fruitless = await self._rebuilt(await crew.dissolve(), fruitless)
            gone_s = time.monotonic() - lost
            self._count(rebuilt=1, rebuild_s=gone_s)
            logger.warning("the ranks are back after %.1f s", gone_s)
            self._crew.set_result(crew)

    async def _end_of(self, crew: Crew) -> str:
        """Why ``crew`` was lost; as long as it lives, others start to stand by."""
        replenishing = asyncio.ensure_future(self._replenish())
        try:
            return await crew.end()
        finally:
            replenishing.cancel()

    async def _replenish(self) -> None:
        """Lets actors start to stand by once every request that waited for this crew has a token of it.

        While it reads their prompts every core is needed: processes that start then double the time it takes.
        """
        await self._behind.none(self._crew)
        self._standby.fill()

    async def _rebuilt(self, actors: dict[int, ActorHandle[Any]], fruitless: int) -> tuple[Crew, int]:
        """A new crew, of what is left of the last, and how many were in a row without a request's token, with it."""
        limit = self.blueprint.config.max_rebuilds
        cause = "each was lost before it produced a token"
        while fruitless < limit:
            fruitless += 1
            missing = [rank for rank in range(self.blueprint.config.mesh.size) if rank not in actors]
            try:
                return await Crew.launch(self.blueprint, actors | self._standby.take(missing)), fruitless
            except Exception as error:
                actors, cause = {}, str(error)
                self._count(failed=1)
                logger.exception("rebuild %d of %d failed", fruitless, limit)
        raise EngineUnavailable(f"{limit} rebuilds in a row have failed: {cause}")

    def _count(self, lost: int = 0, rebuilt: int = 0, failed: int = 0, rebuild_s: float = 0.0) -> None:
        so_far = self.losses
        self.losses = Losses(
            so_far.lost + lost, so_far.rebuilt + rebuilt, so_far.failed + failed, so_far.rebuild_s + rebuild_s
        )

    def _leave(self, crew: Crew) -> None:
        """From now on requests wait for the next crew."""
        if self.state == "serving" and self._crew.result() is crew:
            self._crew = asyncio.get_running_loop().create_future()

    def _fail(self, failure: str) -> None:
        self.failure = self.failure or failure
        if not self._crew.done():
            self._crew.set_exception(EngineUnavailable("the engine could not be rebuilt: try again soon"))
            # Read once here: there may be nobody who waits for it.
            self._crew.exception()
