"""Which bank generations live requests use."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Uses:
    """Counts the uses of every generation; for one event loop."""

    def __init__(self) -> None:
        """Starts without any."""
        self._counts: Counter[int] = Counter()
        self._ended: dict[int, asyncio.Event] = {}

    @contextmanager
    def of(self, generation: int) -> Iterator[None]:
        """Counts one use for as long as the block runs."""
        self._counts[generation] += 1
        try:
            yield
        finally:
            self._counts[generation] -= 1
            if not self._counts[generation]:
                del self._counts[generation]
                if ended := self._ended.pop(generation, None):
                    ended.set()

    async def none(self, generation: int) -> None:
        """Returns once nobody uses the generation."""
        while self._counts[generation]:
            await self._ended.setdefault(generation, asyncio.Event()).wait()
