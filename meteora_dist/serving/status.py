"""What each of our errors is called on the wire: one HTTP status, one OpenAI type and code, one gRPC code."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from meteora_dist.errors import (
    BodyTooLarge,
    EngineUnavailable,
    ExpertNotFound,
    Forbidden,
    InvalidRequest,
    Overloaded,
    PromptTooLong,
    RateLimited,
    RequestExpired,
    StaleGeneration,
    Unauthenticated,
)


@dataclass(frozen=True, slots=True)
class Status:
    """How one kind of error reaches a caller.

    Attributes:
        http: HTTP status.
        type: ``error.type`` of the OpenAI error object.
        code: ``error.code`` of the OpenAI error object.
        grpc: gRPC status code.
        retry_after_s: Seconds after which trying again makes sense; None when it never does.
        challenge: The ``WWW-Authenticate`` header that goes with it; None for none.
    """

    http: int
    type: str
    code: str
    grpc: grpc.StatusCode
    retry_after_s: int | None = None
    challenge: str | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """One error, ready for either protocol.

    Attributes:
        status: What kind it is.
        message: What the caller reads.
        param: The field at fault, or None.
        retry_after_s: Seconds after which trying again makes sense; None for what the status says.
    """

    status: Status
    message: str
    param: str | None = None
    retry_after_s: int | None = None

    def body(self) -> dict[str, object]:
        """The OpenAI error object."""
        error = {
            "message": self.message,
            "type": self.status.type,
            "param": self.param,
            "code": self.status.code,
        }
        return {"error": error}

    def details(self) -> str:
        """The message of a gRPC status. When to try again is part of it: Serve's proxy passes on no trailers here."""
        after = self._after
        return self.message if after is None else f"{self.message} (retry after {after} s)"

    def headers(self) -> dict[str, str]:
        """HTTP headers that go with it."""
        after = self._after
        headers = {} if after is None else {"Retry-After": str(after)}
        return headers if self.status.challenge is None else headers | {"WWW-Authenticate": self.status.challenge}

    @property
    def _after(self) -> int | None:
        return self.status.retry_after_s if self.retry_after_s is None else self.retry_after_s


_MAX_MESSAGE = 1000
"""Characters of a message: it may repeat what the caller sent, and gRPC's trailers are limited to a few kilobytes."""
_INVALID = "invalid_request_error"

INTERNAL = Status(500, "server_error", "internal_error", grpc.StatusCode.INTERNAL)
NO_SUCH_ROUTE = Status(404, _INVALID, "unknown_url", grpc.StatusCode.UNIMPLEMENTED)
METHOD_NOT_ALLOWED = Status(405, _INVALID, "method_not_allowed", grpc.StatusCode.UNIMPLEMENTED)

STATUS_OF: dict[type[BaseException], Status] = {
    InvalidRequest: Status(400, _INVALID, "invalid_value", grpc.StatusCode.INVALID_ARGUMENT),
    PromptTooLong: Status(400, _INVALID, "context_length_exceeded", grpc.StatusCode.INVALID_ARGUMENT),
    ExpertNotFound: Status(404, _INVALID, "model_not_found", grpc.StatusCode.NOT_FOUND),
    StaleGeneration: Status(409, _INVALID, "stale_generation", grpc.StatusCode.ABORTED),
    BodyTooLarge: Status(413, _INVALID, "body_too_large", grpc.StatusCode.RESOURCE_EXHAUSTED),
    Unauthenticated: Status(
        401, _INVALID, "invalid_api_key", grpc.StatusCode.UNAUTHENTICATED, challenge='Bearer realm="meteora"'
    ),
    Forbidden: Status(403, "permission_error", "permission_denied", grpc.StatusCode.PERMISSION_DENIED),
    RateLimited: Status(429, "rate_limit_error", "rate_limit_exceeded", grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
    RequestExpired: Status(408, "timeout_error", "request_timeout", grpc.StatusCode.DEADLINE_EXCEEDED),
    Overloaded: Status(429, "overloaded_error", "overloaded", grpc.StatusCode.RESOURCE_EXHAUSTED, 1),
    EngineUnavailable: Status(503, "service_unavailable_error", "engine_unavailable", grpc.StatusCode.UNAVAILABLE, 5),
    # Whatever else we raise on purpose (a broken checkpoint, say) names files of the server: callers get no detail.
    BaseException: INTERNAL,
}


def failure_of(error: BaseException) -> Failure:
    """How an error reaches the caller: the row of its nearest class; internal errors tell no detail."""
    status = next(STATUS_OF[kind] for kind in type(error).__mro__ if kind in STATUS_OF)
    if status is INTERNAL:
        return Failure(INTERNAL, "the service failed to answer this request; its log says why")
    return Failure(
        status,
        _shortened(str(error)),
        param=error.param if isinstance(error, InvalidRequest) else None,
        retry_after_s=error.retry_after_s if isinstance(error, Overloaded) else None,
    )


def _shortened(message: str) -> str:
    """Without its middle when it is too long: what would be right stands at the end."""
    half = _MAX_MESSAGE // 2
    return message if len(message) <= _MAX_MESSAGE else f"{message[: half - 5]} ... {message[-half:]}"
