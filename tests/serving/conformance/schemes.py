"""Schemathesis, as our fuzzers use it: every operation of an OpenAPI document, with data that fit and that do not."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode, checks
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.serving.conformance.fuzzing import leaks_nothing

CHECKS = [
    *(checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance),
    *(checks.response_headers_conformance, checks.response_schema_conformance, checks.negative_data_rejection),
]
Steer = Callable[[st.DrawFn, Case], None]


class OnLoop:
    """An application as another event loop calls it, which schemathesis makes for every request."""

    def __init__(self, app: ASGIApp, loop: asyncio.AbstractEventLoop) -> None:
        self._app, self._loop = app, loop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        here = asyncio.get_running_loop()

        def back(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
            async def call(*message: Message) -> Any:
                return await _done_on(here, function, *message)

            return call

        await _done_on(self._loop, self._app, scope, back(receive), back(send))


async def _done_on(loop: asyncio.AbstractEventLoop, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
    async def call() -> Any:
        return await function(*arguments)

    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call(), loop))


def fuzz(
    api: ASGIApp, examples: Mapping[str, int], steer: Steer, headers: Mapping[str, str] = MappingProxyType({})
) -> Counter[int]:
    """The HTTP statuses of all answers.

    Args:
        api: The application.
        examples: How many requests of each mode an operation gets, by its id; those that are not named get none.
        steer: May change a request that fits the document.
        headers: Sent with every request.
    """
    seen: Counter[int] = Counter()
    for result in schemathesis.openapi.from_asgi("/openapi.json", api, headers=dict(headers)).get_all_operations():
        operation = result.ok()
        count = examples.get(operation.definition.raw["operationId"], 0)
        for mode in GenerationMode:
            if count and (mode is GenerationMode.POSITIVE or operation.body):
                _ask_all(
                    operation.as_strategy(mode),
                    steer if mode is GenerationMode.POSITIVE else None,
                    count,
                    headers,
                    seen,
                )
    return seen


def _ask_all(
    cases: st.SearchStrategy[Case],
    steer: Steer | None,
    count: int,
    headers: Mapping[str, str],
    seen: Counter[int],
) -> None:
    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases, st.data())
    def ask(case: Case, data: Any) -> None:
        if steer is not None:
            steer(data.draw, case)
        answer = case.call_and_validate(checks=CHECKS, headers=dict(headers))
        leaks_nothing(answer.text + str(dict(answer.headers)))
        seen[answer.status_code] += 1

    ask()
