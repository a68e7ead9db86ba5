"""From what a service says when it fails to the error it means; the pairs are those of ``serving.status``."""

from __future__ import annotations

import json
import re

import grpc
import httpx

from meteora_dist.errors import InvalidRequest, MeteoraError
from meteora_dist.serving.status import INTERNAL, STATUS_OF

_TRY_AGAIN = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)
_TRY_AGAIN_GRPC = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
_RETRY_AFTER = re.compile(r" \(retry after (\d+) s\)$")
_BODY_SHOWN = 200


class CallFailed(MeteoraError):
    """The service did not answer, or not with anything this client knows."""


class CallTimedOut(CallFailed):
    """A call was not over within its time."""


class Failed(Exception):
    """How one attempt failed; never leaves the client.

    Attributes:
        error: What the caller gets when it was the last attempt.
        again: Whether another attempt is safe and may do better.
        retry_after_s: When, if the service said so.
    """

    def __init__(self, error: MeteoraError, again: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.again = again
        self.retry_after_s = retry_after_s


def of_http(response: httpx.Response) -> Failed:
    """What an HTTP status other than 200 means; the body has been read."""
    again = response.status_code in _TRY_AGAIN
    try:
        failed = of_error_object(json.loads(response.content)["error"], f"HTTP {response.status_code}")
    except (KeyError, TypeError, ValueError):
        # Proxies on the way answer in plain text.
        shown = response.content[:_BODY_SHOWN].decode(errors="replace").strip()
        failed = Failed(CallFailed(f"HTTP {response.status_code}: {shown}"))
    return Failed(failed.error, again, _seconds(response.headers.get("retry-after")))


def of_error_object(error: dict[str, str | None], where: str) -> Failed:
    """What an OpenAI error object means; raises KeyError or TypeError when it is none."""
    kinds = {status.code: kind for kind, status in STATUS_OF.items() if status is not INTERNAL}
    kind, message = kinds.get(error["code"] or ""), str(error["message"])
    if kind is None:
        return Failed(CallFailed(f"{where}: {message}"))
    return Failed(_made(kind, message, error.get("param")))


def of_grpc(error: grpc.aio.AioRpcError) -> Failed:
    """What a gRPC status means."""
    code, details = error.code(), error.details() or ""
    told = _RETRY_AFTER.search(details)
    message = details if told is None else details[: told.start()]
    # Our service says when to try again where trying again helps; the same code without it is another error.
    kinds = [
        kind
        for kind, status in STATUS_OF.items()
        if status.grpc is code and status is not INTERNAL and (status.retry_after_s is None) == (told is None)
    ]
    if not kinds:
        return Failed(CallFailed(f"{code.name}: {message}"), again=code in _TRY_AGAIN_GRPC)
    # Several share a code: the one that the others are kinds of.
    general = min(kinds, key=lambda kind: len(kind.__mro__))
    return Failed(_made(general, message, None), told is not None, None if told is None else float(told[1]))


def _made(kind: type[BaseException], message: str, param: str | None) -> MeteoraError:
    error = kind(message, param) if issubclass(kind, InvalidRequest) else kind(message)
    assert isinstance(error, MeteoraError), "the others have the status of internal errors"
    return error


def _seconds(header: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header; None for none, or a date."""
    return float(header) if header is not None and header.isdecimal() else None
