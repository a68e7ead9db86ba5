"""The client for code without asyncio: the same client, on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from threading import Thread
from typing import Any, Self, TypeVar, Unpack

from meteora_dist.client.answers import Piece, Reply
from meteora_dist.client.asynchronous import TIMEOUT_S, AsyncClient
from meteora_dist.client.question import Options, Prompt
from meteora_dist.client.retry import Retry

Result = TypeVar("Result")


class Client:
    """Asks one service inside a ``with`` block, from any number of threads. Arguments as for ``AsyncClient``."""

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout_s: float = TIMEOUT_S, retry: Retry | None = None
    ) -> None:
        self._client = AsyncClient(url, api_key=api_key, timeout_s=timeout_s, retry=retry)
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="meteora-client", daemon=True)
        self._thread.start()
        self._wait(self._client.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._wait(self._client.__aexit__())
        assert self._loop is not None, "it has just been used"
        loop, self._loop = self._loop, None
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    def models(self) -> tuple[str, ...]:
        """As :meth:`AsyncClient.models`."""
        return self._wait(self._client.models())

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Reply:
        """As :meth:`AsyncClient.generate`."""
        return self._wait(self._client.generate(prompt, **options))

    def stream(self, prompt: Prompt, **options: Unpack[Options]) -> Iterator[Piece]:
        """As :meth:`AsyncClient.stream`; leaving the loop cancels the call."""
        pieces = self._client.stream(prompt, **options)

        async def following() -> Piece | None:
            return await anext(pieces, None)

        try:
            while (piece := self._wait(following())) is not None:
                yield piece
        finally:
            self._wait(pieces.aclose())

    def _wait(self, call: Coroutine[Any, Any, Result]) -> Result:
        if self._loop is None:
            call.close()
            raise RuntimeError("the client is open inside its `with` block only")
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except BaseException:
            # An interrupted caller leaves nothing running.
            future.cancel()
            raise
