"""Schemathesis against the service's own OpenAPI document, over the real engine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import strategies as st
from schemathesis import Case

from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.service import TextService
from tests.serving.conformance.fuzzing import at_rest, replies
from tests.serving.conformance.schemes import fuzz
from tests.serving.conformance.ways import Grpc, Http

MODELS = ("auto", "auto-sequence", "base", "plain", "wide:0.5,rooted:1", None)


@pytest.mark.parametrize(
    ("examples", "requests"),
    [(32, 100), pytest.param(600, 2000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
    ids=["quick", "long"],
)
async def test_no_request_breaks_the_service(
    service: TextService, ways: Sequence[Http | Grpc], examples: int, requests: int
) -> None:
    before, free = await replies(ways), await at_rest(service)
    counts = {"createCompletion": examples, "createChatCompletion": examples, "retrieveModel": examples // 8}
    counts |= {"listModels": 2, "healthz": 1, "readyz": 1, "livez": 1}
    seen = await asyncio.to_thread(fuzz, create_api(service), counts, steer)
    assert sum(seen.values()) >= requests, seen
    # A run that is refused at the door tests no more than the door.
    assert min(seen[200], seen[400]) >= requests // 5, seen
    assert seen[404], seen
    assert await replies(ways) == before
    assert await at_rest(service) == free


def steer(draw: st.DrawFn, case: Case) -> None:
    """Mostly a model that is served, and always few tokens: other requests end at the door, or take long."""
    if isinstance(case.body, dict):
        model, tokens = draw(st.sampled_from(MODELS)), draw(st.integers(1, 6))
        limit = "max_completion_tokens" if case.body.get("max_completion_tokens") else "max_tokens"
        case.body = case.body | {limit: tokens} | ({} if model is None else {"model": model})
