"""What live requests use, or wait for."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Uses(Generic[K]):
    """Counts the uses of every thing, as of a bank generation; for one event loop."""

    def __init__(self) -> None:
        """Starts without any."""
        self._counts: Counter[K] = Counter()
        self._ended: dict[K, asyncio.Event] = {}

    @contextmanager
    def of(self, thing: K) -> Iterator[None]:
        """Counts one use for as long as the block runs."""
        self._counts[thing] += 1
        try:
            yield
        finally:
            self._counts[thing] -= 1
            if not self._counts[thing]:
                del self._counts[thing]
                if ended := self._ended.pop(thing, None):
                    ended.set()

    async def none(self, thing: K) -> None:
        """Returns once nobody uses the thing."""
        while self._counts[thing]:
            await self._ended.setdefault(thing, asyncio.Event()).wait()
