"""What docs/security.md promises, promise by promise, over HTTP and gRPC alike where both have it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import httpx
import pytest
import yaml
from fastapi import Depends, FastAPI

from meteora_dist.errors import AdapterError, BankError
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.grpc_api import CallFailed, GrpcMethods
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.http_guard import PUBLIC_PATHS, Guard, admin_only
from meteora_dist.serving.keys import Keyring, key_digest
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.service import TextService
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.conftest import MakeService
from tests.serving.scripted import ScriptedEngine, says
from tests.serving.test_grpc_api import Context

ROOT = Path(__file__).parents[2]
P = "/v1/completions"
ENTRIES: list[dict[str, Any]] = [
    {"name": "all"},
    {"name": "wide", "models": ["wide", "base"]},
    {"name": "root", "role": "admin"},
    {"name": "slow", "requests_per_minute": 2},
    {"name": "single", "max_live_requests": 1},
]

Ask = Callable[..., Awaitable[tuple[str, str]]]
"""Asks with a key and fields; the error's code, or the text, and the message."""


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """The callers of ENTRIES; the key of each is its name."""
    path = tmp_path / "keys.yaml"
    path.write_text(yaml.safe_dump([entry | {"sha256": key_digest(entry["name"])} for entry in ENTRIES]))
    return Gate(Keyring(path))


def http_of(service: TextService) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(create_api(service), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=20)


def bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def ask_http(service: TextService) -> Ask:
    async def ask(key: str | None, **fields: Any) -> tuple[str, str]:
        got = (await http_of(service).post(P, headers=bearer(key), json={"prompt": "Hi"} | fields)).json()
        return (got["error"]["code"], got["error"]["message"]) if "error" in got else (got["choices"][0]["text"], "")

    return ask


CODES = {
    grpc.StatusCode.UNAUTHENTICATED: "invalid_api_key",
    grpc.StatusCode.PERMISSION_DENIED: "permission_denied",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "rate_limit_exceeded",
    grpc.StatusCode.NOT_FOUND: "model_not_found",
    grpc.StatusCode.INVALID_ARGUMENT: "invalid_value",
    grpc.StatusCode.DEADLINE_EXCEEDED: "request_timeout",
    grpc.StatusCode.INTERNAL: "internal_error",
}


def grpc_of(service: TextService) -> GrpcMethods:
    methods = GrpcMethods()
    methods.service = service
    return methods


def ask_grpc(service: TextService) -> Ask:
    async def ask(key: str | None, **fields: Any) -> tuple[str, str]:
        context = Context(key)
        try:
            request = pb.GenerateRequest(**{"prompt": "Hi"} | fields)
            return (await grpc_of(service).Generate(request, context)).choices[0].text, ""
        except CallFailed:
            assert context.code is not None
            return CODES[context.code], context.details

    return ask


both = pytest.mark.parametrize("over", [ask_http, ask_grpc], ids=["http", "grpc"])


@pytest.fixture
def service(tokenizer: TextTokenizer, make_service: MakeService, gate: Gate) -> TextService:
    return make_service(says(tokenizer, "yes"), gate=gate)


@both
async def test_only_a_known_key_is_answered(over: Callable[[TextService], Ask], service: TextService) -> None:
    ask = over(service)
    assert await ask("all") == ("yes", "")
    assert await ask(None) == ("invalid_api_key", "an API key is needed: send it as 'Authorization: Bearer KEY'")
    assert await ask("al") == ("invalid_api_key", "this API key is not known here")
    assert await ask(key_digest("all")) == ("invalid_api_key", "this API key is not known here")


async def test_every_route_but_the_probes_needs_a_key(service: TextService) -> None:
    http = http_of(service)
    api = create_api(service)
    paths = {route.path for route in api.routes if hasattr(route, "path")} | {"/nowhere", "/healthz/", "//healthz"}
    assert {"/v1/models", P, "/openapi.json", *PUBLIC_PATHS} <= paths
    for path in sorted(paths - PUBLIC_PATHS):
        for method in ("GET", "POST", "OPTIONS"):
            got = await http.request(method, path.replace("{name}", "wide"))
            assert got.status_code == 401, path
            assert got.headers["www-authenticate"] == 'Bearer realm="meteora"'
            assert got.json()["error"]["type"] == "invalid_request_error"
    assert [(await http.get(path)).status_code for path in PUBLIC_PATHS] == [200] * 3
    context = Context()
    with pytest.raises(CallFailed):
        await grpc_of(service).ListExperts(pb.ListExpertsRequest(), context)
    assert context.code == grpc.StatusCode.UNAUTHENTICATED


@both
async def test_a_key_is_held_to_its_models(over: Callable[[TextService], Ask], service: TextService) -> None:
    ask = over(service)
    assert await ask("wide", model="wide") == await ask("wide", model="base") == ("yes", "")
    for model in ("plain", "auto", "nobody"):
        assert await ask("wide", model=model) == ("permission_denied", f"this API key may not use the model '{model}'")
    assert (await ask("wide"))[0] == "permission_denied", "the default model is auto"


async def test_a_key_sees_its_models_alone(service: TextService) -> None:
    http = http_of(service)
    listed = (await http.get("/v1/models", headers=bearer("wide"))).json()["data"]
    assert [model["id"] for model in listed] == ["base", "wide"]
    assert (await http.get("/v1/models/wide", headers=bearer("wide"))).status_code == 200
    assert (await http.get("/v1/models/plain", headers=bearer("wide"))).status_code == 403
    experts = (await grpc_of(service).ListExperts(pb.ListExpertsRequest(), Context("wide"))).experts
    assert [expert.name for expert in experts] == ["wide"]


async def test_administration_needs_an_administrators_key(service: TextService, gate: Gate) -> None:
    api = FastAPI()
    api.add_middleware(Guard, gate=gate, limits=service.limits)
    create_api_handlers(api, service)

    @api.delete("/v1/admin/experts/wide", dependencies=[Depends(admin_only)])
    async def remove() -> dict[str, bool]:
        return {"removed": True}

    async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://test") as http:
        for key, status in ((None, 401), ("wrong", 401), ("all", 403), ("root", 200)):
            got = await http.delete("/v1/admin/experts/wide", headers=bearer(key))
            assert got.status_code == status, key
        refused = await http.delete("/v1/admin/experts/wide", headers=bearer("all"))
    assert refused.json()["error"]["code"] == "permission_denied"


def create_api_handlers(api: FastAPI, service: TextService) -> None:
    """The error handlers of the real application."""
    for kind, handler in create_api(service).exception_handlers.items():
        api.add_exception_handler(kind, handler)


@both
async def test_rate_and_concurrency_of_a_key_are_limited(
    over: Callable[[TextService], Ask], tokenizer: TextTokenizer, make_service: MakeService, gate: Gate
) -> None:
    engine = dataclasses.replace(says(tokenizer, "yes"), pause=asyncio.Event())
    ask = over(make_service(engine, gate=gate, max_waiting_requests=5))
    running = asyncio.ensure_future(ask("single"))
    while not engine.seen:
        await asyncio.sleep(0.01)
    code, message = await ask("single")
    assert (code, "max_live_requests of this API key is 1" in message) == ("rate_limit_exceeded", True)
    assert engine.pause is not None
    engine.pause.set()
    assert await running == await ask("single") == await ask("slow") == await ask("slow") == ("yes", "")
    code, message = await ask("slow")
    assert (code, "requests_per_minute of this API key is 2" in message) == ("rate_limit_exceeded", True)


async def test_a_limited_key_is_told_when_to_try_again(service: TextService) -> None:
    http = http_of(service)
    for _ in range(2):
        await http.get("/v1/models", headers=bearer("slow"))
    got = await http.get("/v1/models", headers=bearer("slow"))
    assert (got.status_code, got.headers["retry-after"]) == (429, "30")
    assert got.json()["error"]["type"] == "rate_limit_error"


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("key", ["all", None])
async def test_a_huge_body_is_refused_before_it_is_read(announced: bool, key: str | None, service: TextService) -> None:
    megabyte, sent = b" " * 2**20, 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield megabyte

    headers = bearer(key) | ({"Content-Length": str(100 * 2**20)} if announced else {})
    tracemalloc.start()
    began = time.monotonic()
    got = await http_of(service).post(P, headers=headers, content=body())
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
async def test_a_false_length_changes_nothing(length: str, service: TextService) -> None:
    body = json.dumps({"prompt": "Hi"}).encode()
    got = await http_of(service).post(P, headers=bearer("all") | {"Content-Length": length}, content=body)
    assert got.status_code == (413 if length.startswith("99") else 200)


async def test_a_huge_message_is_refused(service: TextService) -> None:
    context = Context("all")
    with pytest.raises(CallFailed):
        await grpc_of(service).Generate(pb.GenerateRequest(prompt="x" * (5 * 2**20)), context)
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


async def test_a_stream_counts_until_its_reader_has_taken_it(service: TextService) -> None:
    """Serve's proxy tells of the end by ``http.disconnect``, once it has handed on the last part."""
    api, taken, sent = create_api(service), asyncio.Event(), []
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
    assert (service.admission.live, service.gate.calls) == (0, 1)
    assert (await ask_http(service)("single"))[0] == "rate_limit_exceeded"
    taken.set()
    await call
    assert await ask_http(service)("single") == ("yes", "")


LEAKS = ("Traceback", "/srv", 'File "', "0x", "10.0.0.1", "pid=", "site-packages", str(ROOT))


@both
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("/srv/secret at 10.0.0.1"),
        BankError(Path("/srv/secret"), "gate digest"),
        AdapterError(Path("/srv/secret"), "no header"),
        OSError(2, "No such file", "/srv/secret"),
        KeyError("/srv/secret"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_faults_of_ours_tell_nothing(
    over: Callable[[TextService], Ask], error: Exception, make_service: MakeService
) -> None:
    code, message = await over(make_service(ScriptedEngine([], error=error)))(None)
    assert code == "internal_error"
    assert not [leak for leak in LEAKS if leak in message]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff",
        b"[" * 99999,
        b'{"prompt": 5}',
        b'{"prompt": "a", "model": "../../etc/passwd"}',
        b'{"prompt":"\\ud800"}',
    ],
)
async def test_bodies_that_are_wrong_tell_nothing(body: bytes, service: TextService) -> None:
    got = await http_of(service).post(P, content=body, headers=bearer("all"))
    assert 400 <= got.status_code < 500, got.text
    assert not [leak for leak in LEAKS if leak in got.text]


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


def test_reflection_is_off_and_access_is_said_aloud() -> None:
    file = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    assert file["grpc_options"]["enable_reflection"] is False
    assert file["applications"][0]["args"]["access"] == "open"
    assert file["http_options"]["host"] == "127.0.0.1"
    assert "enable_reflection=False" in (ROOT / "meteora_dist" / "serving" / "local.py").read_text()
