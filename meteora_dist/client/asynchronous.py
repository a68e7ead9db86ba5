"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Self, Unpack
from urllib.parse import urlsplit

import httpx

from meteora_dist.client.answers import Piece, Reply
from meteora_dist.client.failures import Failed
from meteora_dist.client.grpc_transport import GrpcTransport
from meteora_dist.client.http_transport import HttpTransport
from meteora_dist.client.question import Options, Prompt, Question
from meteora_dist.client.retry import Retry, retried, within
from meteora_dist.client.transport import Transport
from meteora_dist.errors import InvalidRequest

TIMEOUT_S = 600.0
_SCHEMES = ("http", "https", "grpc", "grpcs")


class AsyncClient:
    """Asks one service, as often and as much at once as you like, inside an ``async with`` block.

    Args:
        url: Where it answers: ``http://host:port`` or ``https://``, ``grpc://host:port`` or, with TLS, ``grpcs://``.
        api_key: Sent with every call.
        timeout_s: Longest a call may take, further attempts and the whole of a stream included.
        retry: How often and when a call is tried again. A stream that has begun never is.
        http: What carries HTTP, for tests; None for the network.

    Raises:
        InvalidRequest: The URL is none of these.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = TIMEOUT_S,
        retry: Retry | None = None,
        http: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in _SCHEMES or not parts.netloc:
            raise InvalidRequest(f"{url!r} must start with http://, https://, grpc:// or grpcs:// and name a host")
        self._url = url
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._retry = retry or Retry()
        self._http = http
        self._transport: Transport | None = None

    async def __aenter__(self) -> Self:
        parts = urlsplit(self._url)
        if parts.scheme.startswith("http"):
            self._transport = HttpTransport(self._url, self._api_key, self._http)
        else:
            self._transport = GrpcTransport(parts.netloc, self._api_key, secure=parts.scheme == "grpcs")
        return self

    async def __aexit__(self, *_: object) -> None:
        transport, self._transport = self._opened, None
        await transport.close()

    async def models(self) -> tuple[str, ...]:
        """Every name that ``model`` may have, blends aside; raises as :meth:`generate`."""
        return await retried(self._opened.models, self._retry, self._deadline())

    async def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Reply:
        """Answers a prompt, several prompts or a conversation in one reply.

        Raises:
            InvalidRequest: The service refuses the call, and says which field is at fault.
            ExpertNotFound: It does not serve the model, or not to this key.
            Unauthenticated: It does not know the key, or wants one.
            Forbidden: The key does not allow the call.
            Overloaded: It had no room, in the last attempt either; RateLimited, its kind, is about this key.
            RequestExpired: The call took longer than the service gives one.
            EngineUnavailable: Its engine was away, in the last attempt either.
            CallTimedOut: The call was not over within ``timeout_s``.
            CallFailed: It cannot be reached, or answered something else.
        """
        transport, question = self._opened, Question(prompt, options)
        return await retried(lambda: transport.generate(question), self._retry, self._deadline())

    async def stream(self, prompt: Prompt, **options: Unpack[Options]) -> AsyncGenerator[Piece, None]:
        """Answers piece by piece; closing the generator cancels the call. Raises as :meth:`generate`."""
        transport, question, deadline = self._opened, Question(prompt, options), self._deadline()

        async def begun() -> tuple[Piece, AsyncGenerator[Piece, None]]:
            pieces = transport.stream(question)
            return await anext(pieces), pieces

        piece, pieces = await retried(begun, self._retry, deadline)
        async with aclosing(pieces):
            while True:
                yield piece
                try:
                    piece = await within(anext(pieces), deadline)
                except StopAsyncIteration:
                    return
                except Failed as failed:
                    raise failed.error from None

    @property
    def _opened(self) -> Transport:
        if self._transport is None:
            raise RuntimeError("the client is open inside its `with` block only")
        return self._transport

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout_s
