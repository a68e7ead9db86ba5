"""What docs/security.md promises of limits, overload, waiting and going away, over HTTP and gRPC alike."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import pytest

from meteora_dist.errors import InvalidRequest, Overloaded
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.grpc_api import CallFailed
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.keys import ANONYMOUS
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.request import TextRequest
from meteora_dist.serving.service import TextService
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.asking import Ask, Context, P, ask_grpc, ask_http, bearer, both, grpc_of, http_of
from tests.serving.conftest import MakeService
from tests.serving.scripted import ScriptedEngine, says
from tests.support.web import served

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("key", ["all", None])
async def test_a_huge_body_is_refused_before_it_is_read(announced: bool, key: str | None, guarded: TextService) -> None:
    megabyte, sent = b" " * 2**20, 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield megabyte

    headers = bearer(key) | ({"Content-Length": str(100 * 2**20)} if announced else {})
    tracemalloc.start()
    began = time.monotonic()
    got = await http_of(guarded).post(P, headers=headers, content=body())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (got.status_code, got.json()["error"]["code"]) == (
        (413, "body_too_large") if key else (401, "invalid_api_key")
    )
    # With a key and no word of the size, as many are read as are allowed, and one more.
    assert sent == (5 if key and not announced else 0)
    assert time.monotonic() - began < 2
    assert peak < 20 * 2**20


@pytest.mark.parametrize("length", ["-1", "5e9", "x", "9" * 5000, "0" * 30 + "5"])
async def test_a_false_length_changes_nothing(length: str, guarded: TextService) -> None:
    body = json.dumps({"prompt": "Hi"}).encode()
    got = await http_of(guarded).post(P, headers=bearer("all") | {"Content-Length": length}, content=body)
    assert got.status_code == (413 if length.startswith("99") else 200)


async def test_a_huge_message_is_refused(guarded: TextService) -> None:
    context = Context("all")
    with pytest.raises(CallFailed):
        await grpc_of(guarded).Generate(pb.GenerateRequest(prompt="x" * (5 * 2**20)), context)
    assert context.code == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert context.details == "a request may have 4194304 bytes at most; this one has more"


@both
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": ["a", "b", "c"]}, "stop is 3 texts, but must be at most 2"),
        ({"stop": ["a" * 9]}, "stop has a text of 9 characters, but must have at most 8"),
        ({"max_tokens": 21}, "max_tokens is 21, but must be at most 20"),
        ({"prompt": "x" * 31}, "prompt has 31 tokens, but may have 30 at most"),
    ],
)
async def test_what_a_request_may_ask_for_is_limited(
    over: Callable[[TextService], Ask],
    fields: dict[str, Any],
    message: str,
    tokenizer: TextTokenizer,
    make_service: MakeService,
) -> None:
    limits = {"max_stops": 2, "max_stop_chars": 8, "max_answer_tokens": 20, "max_prompt_tokens": 30}
    ask = over(make_service(says(tokenizer, "yes"), **limits))
    code, said = await ask(None, **fields)
    assert (code in ("invalid_value", "context_length_exceeded"), said) == (True, message)
    assert await ask(None, stop=["a" * 8, "b"], max_tokens=20, prompt="x" * 30) == ("yes", "")


async def test_who_does_not_say_gets_no_more_than_the_limit(
    tokenizer: TextTokenizer, make_service: MakeService
) -> None:
    engine = says(tokenizer, "a" * 60)
    service = make_service(engine, max_answer_tokens=20)
    (await grpc_of(service).Generate(pb.GenerateRequest(prompt="Hi"), Context()))
    assert engine.seen[0].max_tokens == 20


@both
async def test_a_request_that_takes_too_long_ends(
    over: Callable[[TextService], Ask], tokenizer: TextTokenizer, make_service: MakeService
) -> None:
    engine = dataclasses.replace(says(tokenizer, "yes"), pause=asyncio.Event())
    service = make_service(engine, max_request_s=0.05)
    code, message = await over(service)(None)
    assert (code, "within 0.05 s" in message) == ("request_timeout", True)
    assert engine.closed == [engine.seen[0].request_id]
    assert (service.admission.live, service.gate.calls) == (0, 0)


@pytest.mark.parametrize("stream", [True, False])
async def test_who_goes_away_before_the_first_token_is_not_answered(
    stream: bool, tokenizer: TextTokenizer, make_service: MakeService
) -> None:
    """Under a server that tells of closed connections, but does not cancel what it runs for them."""
    engine = dataclasses.replace(says(tokenizer, "yes"), pause=asyncio.Event())
    service = make_service(engine)
    with served(create_api(service)) as url:
        async with httpx.AsyncClient(base_url=url) as http:
            asked = asyncio.ensure_future(http.post(P, json={"prompt": "Hi", "stream": stream}))
            await until(lambda: bool(engine.seen))
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        await until(lambda: engine.closed == [engine.seen[0].request_id])
        await until(lambda: (service.admission.live, service.gate.calls) == (0, 0))


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


async def test_a_stream_that_takes_too_long_ends_with_an_error(
    tokenizer: TextTokenizer, make_service: MakeService
) -> None:
    """Whatever Serve's own header says that switches its time limit off."""
    engine = ScriptedEngine(list(tokenizer.encode("yes")), pause=cast(asyncio.Event, Twice()))
    service = make_service(engine, max_request_s=0.1)
    headers = {"x-request-timeout-seconds": "0"}
    got = await http_of(service).post(P, json={"prompt": "Hi", "stream": True}, headers=headers)
    *_, last, end = got.text.split("\n\n")
    assert (got.status_code, end) == (200, "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "request_timeout"
    assert engine.closed == [engine.seen[0].request_id]


class Twice:
    """Lets two tokens pass, and then none."""

    passed = 0

    async def wait(self) -> None:
        self.passed += 1
        if self.passed > 2:
            await asyncio.sleep(60)


async def test_time_spent_waiting_counts(tokenizer: TextTokenizer, make_service: MakeService) -> None:
    engine = says(tokenizer, "yes")
    service = make_service(engine, max_request_s=0.1, max_live_requests=1, max_waiting_requests=1)
    async with service.admission.admitted("somebody", 1):
        assert (await ask_http(service)(None))[0] == "request_timeout"
        assert (engine.seen, service.admission.waiting) == ([], 0)
    assert await ask_http(service)(None) == ("yes", "")


async def test_nothing_is_tokenized_for_who_would_be_refused(
    tokenizer: TextTokenizer, make_service: MakeService
) -> None:
    service = make_service(says(tokenizer, "yes"), live=1)
    async with service.admission.admitted("somebody", 1):
        with pytest.raises(Overloaded):
            await service.prepare(TextRequest(("Hi",)), ANONYMOUS)
    with pytest.raises(InvalidRequest, match="asks for 2 answers, but this service generates 1 at once"):
        await service.prepare(TextRequest(("Hi",), n=2), ANONYMOUS)


async def test_one_caller_cannot_keep_the_others_out(
    tokenizer: TextTokenizer, make_service: MakeService, gate: Gate
) -> None:
    engine = dataclasses.replace(says(tokenizer, "yes"), pause=asyncio.Event())
    service = make_service(engine, gate=gate, max_live_requests=1, max_waiting_requests=3)
    ask = ask_http(service)
    flood = [asyncio.ensure_future(ask("all")) for _ in range(8)]
    while service.admission.waiting < 3 or sum(task.done() for task in flood) < 4:
        await asyncio.sleep(0.01)
    modest = asyncio.ensure_future(ask("root"))
    await asyncio.sleep(0.1)
    assert engine.pause is not None
    engine.pause.set()
    assert await modest == ("yes", "")
    codes = [code for code, _ in await asyncio.gather(*flood)]
    assert (codes.count("yes"), codes.count("overloaded")) == (3, 5), "one has made room"


async def test_a_caller_who_goes_away_is_forgotten_at_once(
    tokenizer: TextTokenizer, make_service: MakeService, gate: Gate
) -> None:
    engine = dataclasses.replace(says(tokenizer, "yes"), pause=asyncio.Event())
    service = make_service(engine, gate=gate, max_live_requests=1, max_waiting_requests=1)
    calls = [asyncio.ensure_future(ask("all")) for ask in (ask_http(service), ask_grpc(service))]
    while service.admission.waiting < 1:
        await asyncio.sleep(0.01)
    began = time.monotonic()
    for call in calls:
        call.cancel()
    await asyncio.wait(calls)
    assert time.monotonic() - began < 0.1
    assert (service.admission.live, service.admission.waiting, service.gate.calls) == (0, 0, 0)
    assert engine.closed == [engine.seen[0].request_id]


async def test_a_stream_counts_until_its_reader_has_taken_it(guarded: TextService) -> None:
    """Serve's proxy tells of the end by ``http.disconnect``, once it has handed on the last part."""
    api, taken, sent = create_api(guarded), asyncio.Event(), []
    body = {"type": "http.request", "body": json.dumps({"prompt": "Hi", "stream": True}).encode(), "more_body": False}
    inbox = [body]

    async def receive() -> dict[str, Any]:
        if inbox:
            return inbox.pop()
        await taken.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    headers = [(b"authorization", b"Bearer single")]
    scope = {"type": "http", "method": "POST", "path": P, "query_string": b"", "headers": headers}
    call = asyncio.ensure_future(api(scope, receive, send))  # type: ignore[arg-type]
    while not sent or sent[-1].get("more_body", True):
        await asyncio.sleep(0.01)
    assert (guarded.admission.live, guarded.gate.calls) == (0, 1)
    assert (await ask_http(guarded)("single"))[0] == "rate_limit_exceeded"
    taken.set()
    await call
    assert await ask_http(guarded)("single") == ("yes", "")


async def test_a_service_that_goes_away_lets_calls_end(
    tokenizer: TextTokenizer, make_service: MakeService, gate: Gate
) -> None:
    engine = dataclasses.replace(says(tokenizer, "yes"), pause=asyncio.Event())
    service = make_service(engine, gate=gate)
    running = asyncio.ensure_future(ask_http(service)("all"))
    while not engine.seen:
        await asyncio.sleep(0.01)
    draining = asyncio.ensure_future(gate.drain(10))
    await asyncio.sleep(0)
    got = await http_of(service).post(P, json={"prompt": "Hi"}, headers=bearer("all"))
    assert (got.status_code, got.headers["retry-after"]) == (503, "5")
    assert engine.pause is not None
    engine.pause.set()
    assert (await running, await draining) == (("yes", ""), True)
