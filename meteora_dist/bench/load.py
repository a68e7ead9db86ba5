"""Streams from any OpenAI endpoint, so many at a time, each with the times of its pieces."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from meteora_dist.errors import InvalidRequest

OK = "ok"
REJECTED = "429"

_DATA = "data: "
_DONE = "[DONE]"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 10.0
_WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many"
)
"""Words that are one token each in nearly every vocabulary."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What is sent. It ends by itself: after ``requests``, or when ``duration_s`` is over and the last stream ends.

    Attributes:
        url: Where the endpoint answers, with its ``/v1``.
        models: Asked in turn; a model that is named twice gets twice as many requests.
        concurrency: Streams at a time, each from a caller of its own.
        requests: How many requests there are; None leaves the end to ``duration_s``.
        duration_s: How long new requests are begun; None leaves the end to ``requests``.
        prompt_tokens: Words of a prompt, which most vocabularies make as many tokens of.
        answer_tokens: ``max_tokens``.
        spread: By what part of these the lengths of a request may be less, drawn at random; 0 makes all alike, and
            streams that began together end together.
        chat: Whether the chat endpoint is asked, and not that for completions.
        ignore_eos: Whether answers go on after their end up to ``answer_tokens``; not every endpoint knows that field.
        api_key: Sent with every request.
        timeout_s: Longest a request may take.
        ramp_s: Seconds over which the callers begin, one after the other; 0 for all at once.
        seed: Of the prompts, which differ from each other.
    """

    url: str
    models: tuple[str, ...]
    concurrency: int = 8
    requests: int | None = 64
    duration_s: float | None = None
    prompt_tokens: int = 32
    answer_tokens: int = 32
    spread: float = 0.0
    chat: bool = False
    ignore_eos: bool = False
    api_key: str | None = None
    timeout_s: float = 300.0
    ramp_s: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https"):
            raise InvalidRequest(f"{self.url!r} must start with http:// or https://")
        if not self.models:
            raise InvalidRequest("a load needs at least one model")
        if not 0 <= self.spread < 1:
            raise InvalidRequest(f"the spread is {self.spread}, but must be at least 0 and below 1")
        if self.requests is None and self.duration_s is None:
            raise InvalidRequest("a load needs an end: requests, a duration, or both")

    def body(self, number: int) -> dict[str, Any]:
        """The ``number``-th request."""
        dice = random.Random(f"{self.seed}-{number}")
        words, answer = (
            dice.randint(max(1, round(most * (1 - self.spread))), most)
            for most in (self.prompt_tokens, self.answer_tokens)
        )
        prompt = " ".join(dice.choices(_WORDS.split(), k=words))
        content: dict[str, Any] = (
            {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        )
        return content | {
            "model": self.models[number % len(self.models)],
            "max_tokens": answer,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if self.ignore_eos else {}),
        }


@dataclass(slots=True)
class Call:
    """One request as it went. Times are seconds of ``time.perf_counter``.

    Attributes:
        model: Who was asked.
        began: When.
        ended: When its last byte, or its refusal, was there.
        outcome: ``ok``, the HTTP status of a refusal, or the name of what went wrong.
        detail: What the endpoint said about a failure.
        pieces: When each piece with text came.
        prompt_tokens: As the endpoint counts; 0 when it does not say.
        completion_tokens: Likewise; the number of pieces when it does not say.
        retry_after_s: When a refused caller was told to come back.
    """

    model: str
    began: float
    ended: float = 0.0
    outcome: str = OK
    detail: str = ""
    pieces: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retry_after_s: float | None = None


async def send(plan: LoadPlan, finished: Callable[[Call], None] = lambda call: None) -> list[Call]:
    """Sends the load; returns all its requests in the order in which they ended.

    A caller who is refused comes back with its next request when it was told to, or up to half as late again.

    Args:
        plan: What to send.
        finished: Told of every request.
    """
    calls: list[Call] = []
    numbers = _numbers(plan)
    headers = {} if plan.api_key is None else {"Authorization": f"Bearer {plan.api_key}"}
    async with httpx.AsyncClient(
        headers=headers,
        timeout=httpx.Timeout(None),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        # A proxy of the environment has no part in what is measured on this machine.
        trust_env=urlsplit(plan.url).hostname not in _LOOPBACK,
    ) as http:

        async def caller(which: int) -> None:
            await asyncio.sleep(plan.ramp_s * which / plan.concurrency)
            for number in numbers:
                call = await _one(http, plan, plan.body(number))
                calls.append(call)
                finished(call)
                if call.outcome != OK:
                    # Those who were refused together must not come back together.
                    pause = min(call.retry_after_s or _PAUSE_S, _LONGEST_PAUSE_S)
                    await asyncio.sleep(pause * random.uniform(1.0, 1.5))

        await asyncio.gather(*map(caller, range(plan.concurrency)))
    return calls


def _numbers(plan: LoadPlan) -> Iterator[int]:
    """Numbers of requests, shared by all callers, until the load ends."""
    end = None if plan.duration_s is None else time.perf_counter() + plan.duration_s
    number = 0
    while (plan.requests is None or number < plan.requests) and (end is None or time.perf_counter() < end):
        yield number
        number += 1


async def _one(http: httpx.AsyncClient, plan: LoadPlan, body: dict[str, Any]) -> Call:
    path = "chat/completions" if plan.chat else "completions"
    call = Call(body["model"], time.perf_counter())
    try:
        async with (
            asyncio.timeout(plan.timeout_s),
            http.stream("POST", f"{plan.url.rstrip('/')}/{path}", json=body) as response,
        ):
            if response.status_code == httpx.codes.OK:
                await _read(response, call)
            else:
                call.outcome = str(response.status_code)
                call.detail = (await response.aread()).decode(errors="replace")
                after = response.headers.get("retry-after", "")
                call.retry_after_s = float(after) if after.isdecimal() else None
    except TimeoutError:
        call.outcome, call.detail = "timeout", f"not over within {plan.timeout_s:g} s"
    except httpx.HTTPError as error:
        call.outcome, call.detail = type(error).__name__, str(error)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        call.outcome, call.detail = "unreadable", repr(error)
    call.ended = time.perf_counter()
    return call


async def _read(response: httpx.Response, call: Call) -> None:
    async for chunk in _chunks(response):
        if "error" in chunk:
            call.outcome, call.detail = "error in stream", str(chunk["error"].get("message"))
            return
        for choice in chunk["choices"]:
            if choice.get("text") or choice.get("delta", {}).get("content"):
                call.pieces.append(time.perf_counter())
        if usage := chunk.get("usage"):
            call.prompt_tokens, call.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    call.completion_tokens = call.completion_tokens or len(call.pieces)


async def _chunks(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    async for line in response.aiter_lines():
        if line == _DATA + _DONE:
            return
        if line.startswith(_DATA):
            yield json.loads(line.removeprefix(_DATA))
    raise ValueError("the stream was cut off before its end")
