"""Watches HTTP calls from the outside: whatever happens inside, each has an id, an end and a log line.

Probes are neither counted nor logged: they come every few seconds.
"""

from __future__ import annotations

from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from meteora_dist.observability.calls import CANCELLED, Call, Observer
from meteora_dist.serving.http_guard import PROBES, path_of

REQUEST_ID = "x-request-id"


class Observed:
    """Middleware: one ``Call`` around every HTTP request, and its id in the answer."""

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        """Wraps ``app``."""
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http" or path_of(scope) in PROBES:
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        call = self._observer.call("http", "unmatched", headers)
        # Serve gives every request an id, and puts it into the answer itself.
        request_id = None if headers.get(REQUEST_ID) == call.request_id else call.request_id
        with call:
            try:
                await self._app(scope, receive, _Sender(send, call, request_id, scope))
            finally:
                call.operation = _route(scope)
            # Has no effect when the answer is complete.
            call.failed(CANCELLED, "cancelled")


class _Sender:
    """Passes an answer on, with the id of its call, which ends with it."""

    def __init__(self, send: Send, call: Call, request_id: str | None, scope: Scope) -> None:
        self._send = send
        self._call = call
        self._request_id = request_id
        self._scope = scope

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            if message["status"] >= HTTPStatus.BAD_REQUEST:
                self._call.failed(message["status"], "http_error")
            if self._request_id is not None:
                header = (REQUEST_ID.encode(), self._request_id.encode())
                message = {**message, "headers": [*message.get("headers", []), header]}
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._call.operation = _route(self._scope)
            self._call.end()


def _route(scope: Scope) -> str:
    """The route as it is declared: a path may hold what a caller likes."""
    route = scope.get("route")
    return f"{scope['method']} {route.path}" if route is not None else "unmatched"
