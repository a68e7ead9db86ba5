"""Trying again, where that is safe: nothing of the answer was there yet, and the service is only busy or away."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from meteora_dist.client.failures import CallTimedOut, Failed

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Retry:
    """How often and when to try again.

    Attributes:
        times: Attempts after the first one; 0 for none.
        first_s: Longest pause before the second attempt; it doubles with every further one.
        longest_s: Longest pause; a service that asks for a longer one is not asked again.
    """

    times: int = 4
    first_s: float = 0.5
    longest_s: float = 30.0

    def pause_s(self, failures: int, retry_after_s: float | None) -> float | None:
        """Seconds until the next attempt after so many failed ones, drawn at random; None to give up."""
        asked_for = retry_after_s or 0.0
        if failures > self.times or asked_for > self.longest_s:
            return None
        backoff = min(self.first_s * 2 ** (failures - 1), self.longest_s)
        # Callers that were refused together must not come back together.
        return asked_for + random.uniform(backoff / 2, backoff)


async def retried(attempt: Callable[[], Awaitable[Result]], retry: Retry, deadline: float) -> Result:
    """What ``attempt`` returns, the first time it does not fail.

    Args:
        attempt: Raises :class:`Failed`.
        retry: How often and when.
        deadline: When to give up, on the clock of the event loop.

    Raises:
        MeteoraError: The last failure.
        CallTimedOut: The deadline has passed.
    """
    failures = 0
    while True:
        try:
            return await within(attempt(), deadline)
        except Failed as failed:
            failures += 1
            pause = retry.pause_s(failures, failed.retry_after_s) if failed.again else None
            if pause is None or asyncio.get_running_loop().time() + pause > deadline:
                raise failed.error from None
        await asyncio.sleep(pause)


async def within(result: Awaitable[Result], deadline: float) -> Result:
    """Waits for ``result``; raises CallTimedOut, and cancels it, when the deadline passes."""
    try:
        async with asyncio.timeout_at(deadline):
            return await result
    except TimeoutError:
        raise CallTimedOut("the call was not over within its timeout_s") from None
