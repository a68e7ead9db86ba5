"""One rank of the world as a Ray actor."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from importlib import import_module
from typing import TYPE_CHECKING, cast

from meteora_cluster.member import Member
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.report import RankReport
from meteora_dist.engine.request import GenerationRequest, TokenEvent
from meteora_dist.errors import EngineUnavailable
from meteora_dist.moe.residency import Residency

if TYPE_CHECKING:
    from meteora_dist.engine.rank import RankEngine


_STANDBY_NICE = 10
"""Of what standby processes import: a tenth of the time of a core that a rank keeps busy, all of an idle one."""


class RankActor(Member):
    """Runs one :class:`~meteora_dist.engine.rank.RankEngine` for a replica in another process."""

    # Outlives ``assign``, which calls the constructor again.
    _importer: threading.Thread | None = None

    def __init__(self, config: EngineConfig, rank: int, residency: Residency) -> None:
        self._config = config
        self._rank = rank
        self._residency = residency
        self._engine: RankEngine | None = None

    async def stand_by(self) -> None:
        """Imports what the engine needs, in little of the time that the ranks at work would use."""
        # A thread of its own, as one that was slowed down may not always be sped up again.
        self._importer = threading.Thread(target=_import_engine, args=(_STANDBY_NICE,), daemon=True)
        self._importer.start()
        await asyncio.to_thread(self._importer.join)

    async def start(self, rendezvous: str) -> None:
        """Loads the model and this rank's experts; returns when all ranks have met at ``rendezvous``."""
        meeting = f"tcp://{rendezvous}" if self._config.mesh.size > 1 else None
        if self._importer is not None and self._importer.native_id is not None:
            _set_nice(self._importer.native_id, 0)
        try:
            self._engine = await asyncio.to_thread(_load, self._config, self._rank, meeting, self._residency)
        except Exception as error:
            # Plain text crosses processes whatever the error is made of.
            raise RuntimeError(f"{type(error).__name__}: {error}") from None

    async def leave(self) -> None:
        """Ends the engine, wherever it waits for lost ranks, and frees all it holds."""
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.abandon)
            del engine
            # What ended it holds its frames, and they hold tensors; the next one needs the room.
            gc.collect()

    async def watch(self) -> None:
        """Runs for as long as the generation loop does; raises EngineUnavailable when it has died."""
        engine = self._running()
        await asyncio.to_thread(engine.wait)
        engine.check()

    async def beat(self) -> float | None:
        """Seconds since the generation loop began its latest step; None while it sleeps or is still to start."""
        return None if self._engine is None else self._engine.stalled_s()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yields the request's tokens; cancelling the call frees what it holds on this rank."""
        tokens = cast(AsyncGenerator[TokenEvent, None], self._running().generate(request))
        async with aclosing(tokens) as events:
            async for event in events:
                yield event

    async def prepare(self, number: int, residency: Residency) -> None:
        """Loads what this rank lacks of ``residency``, beside what it holds; see ``RankEngine.prepare``."""
        await asyncio.to_thread(self._running().prepare, number, residency)

    async def commit(self, number: int) -> None:
        """Returns once a prepared change is in force on all ranks; see ``RankEngine.commit``."""
        await asyncio.to_thread(self._running().commit, number)

    async def discard(self, number: int) -> None:
        """Forgets a change, if it was prepared; see ``RankEngine.discard``."""
        self._running().discard(number)

    async def report(self) -> RankReport:
        """How it is; see ``RankEngine.report``."""
        return await asyncio.to_thread(self._running().report)

    def _running(self) -> RankEngine:
        if self._engine is None:
            raise EngineUnavailable("this rank has not started yet")
        return self._engine


def _import_engine(nice: int) -> None:
    _set_nice(threading.get_native_id(), nice)
    # Nothing of it is garbage, and looking for some takes a sixth of the time.
    gc.disable()
    try:
        import_module("meteora_dist.engine.rank")
    finally:
        gc.enable()


def _set_nice(thread: int, nice: int) -> None:
    # Over already, or one that was slowed down by a process without the right to undo that.
    with suppress(ProcessLookupError, PermissionError):
        os.setpriority(os.PRIO_PROCESS, thread, nice)


def _load(config: EngineConfig, rank: int, meeting: str | None, residency: Residency) -> RankEngine:
    # Imported here: the replica knows this module too, and has no use for the engine's libraries.
    from meteora_dist.engine.rank import RankEngine

    return RankEngine(config, rank, meeting, residency)
