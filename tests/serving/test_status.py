"""Every error class has a row, and internal ones keep their details."""

from __future__ import annotations

import inspect
from pathlib import Path

import grpc
import pytest

from meteora_dist import errors
from meteora_dist.errors import (
    BankError,
    BodyTooLarge,
    EngineUnavailable,
    ExpertNotFound,
    Forbidden,
    InvalidRequest,
    KeysError,
    Overloaded,
    PromptTooLong,
    RateLimited,
    RequestExpired,
    StaleGeneration,
    Unauthenticated,
)
from meteora_dist.serving.status import INTERNAL, failure_of


@pytest.mark.parametrize(
    ("error", "http", "code", "rpc"),
    [
        (InvalidRequest("wrong", "top_p"), 400, "invalid_value", grpc.StatusCode.INVALID_ARGUMENT),
        (PromptTooLong("long"), 400, "context_length_exceeded", grpc.StatusCode.INVALID_ARGUMENT),
        (ExpertNotFound("who"), 404, "model_not_found", grpc.StatusCode.NOT_FOUND),
        (StaleGeneration("late"), 409, "stale_generation", grpc.StatusCode.ABORTED),
        (BodyTooLarge("big"), 413, "body_too_large", grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unauthenticated("who"), 401, "invalid_api_key", grpc.StatusCode.UNAUTHENTICATED),
        (Forbidden("no"), 403, "permission_denied", grpc.StatusCode.PERMISSION_DENIED),
        (RateLimited("often"), 429, "rate_limit_exceeded", grpc.StatusCode.RESOURCE_EXHAUSTED),
        (RequestExpired("late"), 408, "request_timeout", grpc.StatusCode.DEADLINE_EXCEEDED),
        (Overloaded("full"), 429, "overloaded", grpc.StatusCode.RESOURCE_EXHAUSTED),
        (EngineUnavailable("gone"), 503, "engine_unavailable", grpc.StatusCode.UNAVAILABLE),
    ],
)
def test_callers_errors_keep_their_message(error: Exception, http: int, code: str, rpc: grpc.StatusCode) -> None:
    failure = failure_of(error)
    assert (failure.status.http, failure.status.code, failure.status.grpc) == (http, code, rpc)
    assert failure.message == str(error)


def test_the_field_at_fault_is_in_the_body() -> None:
    assert failure_of(InvalidRequest("wrong", "top_p")).body() == {
        "error": {"message": "wrong", "type": "invalid_request_error", "param": "top_p", "code": "invalid_value"}
    }


@pytest.mark.parametrize(
    "error",
    [BankError(Path("/srv/secret"), "damaged"), KeysError(Path("/srv/secret"), ""), RuntimeError("/srv/secret")],
)
def test_errors_of_ours_tell_no_detail(error: Exception) -> None:
    failure = failure_of(error)
    assert failure.status is INTERNAL
    assert "secret" not in str(failure.body())


def test_only_what_passes_by_itself_says_when_to_try_again() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    retried = {kind.__name__ for kind in kinds if "Retry-After" in failure_of(_any(kind)).headers()}
    assert retried == {"Overloaded", "RateLimited", "EngineUnavailable"}


def test_an_error_that_knows_says_when_and_a_missing_key_is_asked_for() -> None:
    failure = failure_of(RateLimited("often", 17))
    assert (failure.headers(), failure.details()) == ({"Retry-After": "17"}, "often (retry after 17 s)")
    assert failure_of(Unauthenticated("who")).headers() == {"WWW-Authenticate": 'Bearer realm="meteora"'}


def _any(kind: type[Exception]) -> Exception:
    return kind(Path("x"), "y") if issubclass(kind, errors.CheckpointError) else kind("y")
