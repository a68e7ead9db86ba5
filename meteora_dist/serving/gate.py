"""The gate that every call passes, whatever protocol it comes by: who calls, and is it too much?"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from meteora_dist.errors import EngineUnavailable, InvalidRequest, RateLimited, Unauthenticated
from meteora_dist.observability.calls import current_call
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.keys import ANONYMOUS, Caller, Clock, Keyring

KEYS_FILE_VARIABLE = "METEORA_KEYS_FILE"
"""Environment variable that names the keys file where the configuration does not."""

_MINUTE_S = 60.0


class TokenBucket:
    """So many calls a minute: all of them at once after a minute's rest, one after the other at the minute's pace."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._calls = float(per_minute)
        self._counted = now

    def take(self, now: float) -> float:
        """Takes one call, and returns 0; or takes none, and returns the seconds until there is one."""
        refill = (now - self._counted) * self.per_minute / _MINUTE_S
        self._calls = min(self._calls + refill, float(self.per_minute))
        self._counted = now
        if self._calls >= 1:
            self._calls -= 1
            return 0.0
        return (1 - self._calls) * _MINUTE_S / self.per_minute


class Gate:
    """What every call passes first: it tells who calls, counts the call, and refuses what is too much."""

    def __init__(self, keyring: Keyring | None, anonymous: bool = False, clock: Clock = time.monotonic) -> None:
        """A gate that is open for calls.

        Args:
            keyring: The known keys.
            anonymous: Whether callers without a known key may enter.
            clock: Seconds.
        """
        self._keyring = keyring
        self._anonymous = anonymous
        self._clock = clock
        self._buckets: dict[str, TokenBucket] = {}
        self._calls: Counter[str] = Counter()
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    @classmethod
    def of(cls, config: ServiceConfig) -> Self:
        """The gate a configuration asks for.

        Raises:
            InvalidRequest: It asks for keys, and nobody says where they are.
            KeysError: The keys file cannot be used.
        """
        named = os.environ.get(KEYS_FILE_VARIABLE)
        path = config.keys_file or (Path(named) if named else None)
        if path is None and config.access == "keys":
            raise InvalidRequest(
                f"access is 'keys', but there are none: name a keys file with keys_file or the environment variable "
                f"{KEYS_FILE_VARIABLE}, or let everybody in with access: open",
                "access",
            )
        return cls(None if path is None else Keyring(path), config.access == "open")

    @contextmanager
    def enter(self, authorization: str | None) -> Iterator[Caller]:
        """Lets a call in for the length of the block.

        Args:
            authorization: Its ``Authorization`` header or metadata.

        Yields:
            Who calls.

        Raises:
            EngineUnavailable: The gate is closed.
            Unauthenticated: It has no key, or an unknown one.
            RateLimited: Its key has used up its calls.
        """
        self.check()
        caller = self._identify(authorization)
        current_call().key = caller.name
        self._demand_room(caller)
        self._calls[caller.name] += 1
        self._empty.clear()
        try:
            yield caller
        finally:
            self._calls[caller.name] -= 1
            self._calls += Counter()  # drops the zeros
            if not self._calls:
                self._empty.set()

    def check(self) -> None:
        """Raises EngineUnavailable when the gate is closed."""
        if self._closed:
            raise EngineUnavailable("this replica of the service is going out of service: try again")

    @property
    def calls(self) -> int:
        """Calls under way."""
        return self._calls.total()

    async def drain(self, timeout_s: float) -> bool:
        """Lets nobody in any more, and waits for the calls under way; whether all ended within ``timeout_s``."""
        self._closed = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._empty.wait()
        except TimeoutError:
            return False
        return True

    def _identify(self, authorization: str | None) -> Caller:
        scheme, _, key = (authorization or "").partition(" ")
        presented = key.strip() if scheme.lower() == "bearer" else ""
        entry = self._keyring.find(presented) if self._keyring is not None and presented else None
        if entry is not None:
            return entry
        if self._anonymous:
            return ANONYMOUS
        if not presented:
            raise Unauthenticated("an API key is needed: send it as 'Authorization: Bearer KEY'")
        raise Unauthenticated("this API key is not known here")

    def _demand_room(self, caller: Caller) -> None:
        limit = caller.max_live_requests
        if limit is not None and self._calls[caller.name] >= limit:
            raise RateLimited(f"max_live_requests of this API key is {limit}, and as many calls are under way")
        rate = caller.requests_per_minute
        if rate is None:
            return
        now = self._clock()
        bucket = self._buckets.get(caller.name)
        if bucket is None or bucket.per_minute != rate:
            bucket = self._buckets[caller.name] = TokenBucket(rate, now)
        wait_s = bucket.take(now)
        if wait_s > 0:
            raise RateLimited(f"requests_per_minute of this API key is {rate}, and they are used up", math.ceil(wait_s))
