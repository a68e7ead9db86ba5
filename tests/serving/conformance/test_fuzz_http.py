"""Schemathesis against the service's own OpenAPI document, over the real engine."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, checks

from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.service import TextService
from tests.serving.conformance.fuzzing import at_rest, leaks_nothing, replies
from tests.serving.conformance.ways import Grpc, Http

CHECKS = [
    *(checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance),
    *(checks.response_headers_conformance, checks.response_schema_conformance, checks.negative_data_rejection),
]
MODELS = ("auto", "auto-sequence", "base", "plain", "wide:0.5,rooted:1")
OFTEN = {"createCompletion", "createChatCompletion"}


@pytest.mark.parametrize(
    ("examples", "requests"),
    [(16, 100), pytest.param(300, 2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
    ids=["quick", "long"],
)
async def test_no_request_breaks_the_service(
    service: TextService, ways: Sequence[Http | Grpc], examples: int, requests: int
) -> None:
    before, free = await replies(ways), await at_rest(service)
    seen = await asyncio.to_thread(fuzz, create_api(service), examples)
    assert sum(seen.values()) >= requests, seen
    # A run that is refused at the door tests no more than the door.
    assert min(seen[200], seen[400]) >= requests // 5, seen
    assert seen[404], seen
    assert await replies(ways) == before
    assert await at_rest(service) == free


def fuzz(api: FastAPI, examples: int) -> Counter[int]:
    """The HTTP statuses of all answers; more examples for the operations that do more."""
    seen: Counter[int] = Counter()
    for result in schemathesis.openapi.from_asgi("/openapi.json", api).get_all_operations():
        operation = result.ok()
        count = 2 * examples if operation.definition.raw["operationId"] in OFTEN else examples // 4
        for mode in GenerationMode:
            if mode is GenerationMode.POSITIVE or operation.body:
                ask_all(operation.as_strategy(mode), mode, count, seen)
    return seen


def ask_all(cases: st.SearchStrategy[Case], mode: GenerationMode, count: int, seen: Counter[int]) -> None:
    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases, st.sampled_from((*MODELS, None)), st.integers(1, 6))
    def ask(case: Case, model: str | None, tokens: int) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body = steered(case.body, model, tokens)
        answer = case.call_and_validate(checks=CHECKS)
        leaks_nothing(answer.text + str(dict(answer.headers)))
        seen[answer.status_code] += 1

    ask()


def steered(body: dict[str, Any], model: str | None, tokens: int) -> dict[str, Any]:
    """The body with a model that is served, unless ``model`` is None, and few tokens: most others end at the door."""
    limit = "max_completion_tokens" if body.get("max_completion_tokens") else "max_tokens"
    return body | {limit: tokens} | ({} if model is None else {"model": model})
