"""Rounds: every few seconds all ranks are asked what they count, and the answers become metrics."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from meteora_dist.errors import EngineUnavailable
from meteora_dist.observability import metrics
from meteora_dist.observability.ranks import RankMeter, Serving
from meteora_dist.serving.service import TextService
from meteora_dist.serving.world import World

logger = logging.getLogger(__name__)


class Rounds:
    """Goes round the ranks of one replica for as long as it lives."""

    def __init__(
        self, world: World, service: TextService, meter: RankMeter, serving: Callable[[], Serving], interval_s: float
    ) -> None:
        """Prepares the rounds; ``start`` begins them.

        Args:
            world: The ranks.
            service: Answers the calls.
            meter: Makes metrics of what ranks say.
            serving: Says what they serve at the moment.
            interval_s: Seconds between two rounds, and how long the ranks have to answer.
        """
        self._world = world
        self._service = service
        self._meter = meter
        self._serving = serving
        self._interval_s = interval_s
        self._going: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins with the first round at once."""
        self._going = asyncio.ensure_future(self._go())

    async def one(self) -> None:
        """One round; ranks that are lost, or do not answer in time, are left out."""
        observer, recorder = self._service.observer, self._service.observer.recorder
        recorder.set(metrics.LIVE_REQUESTS, observer.live)
        recorder.set(metrics.WAITING_REQUESTS, self._service.admission.waiting)
        recorder.set(metrics.READY, self._world.state == "serving" and self._service.missing is None)
        self._meter.losses(self._world.losses)
        if self._world.state != "serving":
            return
        try:
            async with asyncio.timeout(self._interval_s):
                ranks = await self._world.reports()
        except (EngineUnavailable, TimeoutError):
            return
        self._meter.look(ranks, self._serving())

    async def _go(self) -> None:
        while True:
            try:
                await self.one()
            except Exception:
                logger.exception("a round for metrics has failed")
            await asyncio.sleep(self._interval_s)
