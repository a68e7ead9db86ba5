"""Work that goes on to its end whoever waits for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Background:
    """Tasks that nobody cancels; for one event loop, which itself holds on to no task."""

    def __init__(self) -> None:
        """Starts without any."""
        self._tasks: set[asyncio.Task[Any]] = set()

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` returns or raises. It is done even if the caller is cancelled; a failure is then logged."""
        task = self._task(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_log)
            raise

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Returns at once; should ``work`` fail, the log says so."""
        self._task(work).add_done_callback(_log)

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _log(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and task.exception() is not None:
        logger.error("work in the background has failed", exc_info=task.exception())
