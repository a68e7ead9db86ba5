"""What stands before the HTTP application: API keys, the size of bodies, the end of streams."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meteora_dist.errors import MeteoraError
from meteora_dist.observability.calls import current_call
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.keys import Caller
from meteora_dist.serving.limits import Limits
from meteora_dist.serving.status import Failure, failure_of

PROBES = frozenset({"/healthz", "/readyz", "/livez"})


def path_of(scope: Scope) -> str:
    """The path below the prefix that the application is served at; the prefix itself is ``/``."""
    path: str = scope["path"]
    prefix: str = scope.get("root_path", "")
    below = path.removeprefix(prefix)
    return (below or "/") if not below or below.startswith("/") else path


_DIGITS = 20
"""Of a length that are worth reading: more is too much whatever it is."""


class Guard:
    """ASGI middleware: nothing of a request reaches the application, nor is its body read, before its key is known."""

    def __init__(self, app: ASGIApp, gate: Gate, limits: Limits, public: Collection[str] = PROBES) -> None:
        """Wraps ``app``; the paths in ``public`` answer without a key."""
        self._app = app
        self._gate = gate
        self._limits = limits
        self._public = frozenset(public)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on with its caller in ``request.state``, or answers with the error."""
        if scope["type"] != "http" or path_of(scope) in self._public:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        ends = asyncio.get_running_loop().time() + self._limits.max_request_s
        try:
            with self._gate.enter(headers.get("authorization")) as caller:
                self._limits.check_size(_length(headers))
                scope.setdefault("state", {})["caller"] = caller
                reply = _Reply(send)
                await self._app(scope, _Body(receive, self._limits), reply)
                if reply.in_parts:
                    await _taken(receive, ends)
        except MeteoraError as error:
            failure = failure_of(error)
            current_call().failed(failure.status.http, failure.status.code)
            await failure_response(failure)(scope, receive, send)


def caller_of(request: Request) -> Caller:
    """Who sent a request; the guard has put it there."""
    caller: Caller = request.state.caller
    return caller


class CallerGone(Exception):
    """Nobody waits for the answer any more."""


@contextlib.asynccontextmanager
async def while_wanted(request: Request) -> AsyncIterator[None]:
    """Cancels the block when the caller closes the connection, which not every server does by itself.

    The body has to be read before.

    Raises:
        CallerGone: It was closed.
    """
    working = asyncio.current_task()
    assert working is not None, "requests are answered in tasks"
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        working.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        # Somebody else may have cancelled the task as well.
        if gone and not working.uncancel():
            raise CallerGone from None
        raise
    finally:
        watching.cancel()


def failure_response(failure: Failure) -> JSONResponse:
    """An OpenAI error object."""
    return JSONResponse(failure.body(), failure.status.http, failure.headers())


class _Body:
    """Counts the bytes of a body as they come, and stops reading where they are too many."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive = receive
        self._limits = limits
        self._read = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        self._limits.check_size(self._read)
        return message


class _Reply:
    """Passes a reply on, and notes whether it comes in parts."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.in_parts = False

    async def __call__(self, message: Message) -> None:
        self.in_parts = self.in_parts or bool(message.get("more_body", False))
        await self._send(message)


async def _taken(receive: Receive, until: float) -> None:
    """Waits until the proxy has handed a whole stream to its reader, or nobody is there any more.

    Serve's proxy keeps what a slow reader has not taken yet. As long as it does, the call counts as under way.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout_at(until):
            while (await receive())["type"] != "http.disconnect":
                pass


def _length(headers: Headers) -> int:
    """What the request says of the size of its body; 0 when it says nothing that can be used."""
    length = headers.get("content-length", "")
    return int(length[:_DIGITS]) if length.isascii() and length.isdigit() else 0
