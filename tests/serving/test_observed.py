"""Calls over HTTP and gRPC as operators see them: ids, log lines, metrics and spans, and never their text."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from meteora_dist.errors import EngineUnavailable
from meteora_dist.observability import metrics
from meteora_dist.observability.calls import Observer
from meteora_dist.observability.logs import JsonFormatter
from meteora_dist.observability.memory import MemoryRecorder
from meteora_dist.observability.metrics import Metric
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.grpc_api import CallFailed, GrpcMethods
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.keys import Keyring, key_digest
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.service import TextService
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.asking import Context
from tests.serving.conftest import MakeService
from tests.serving.scripted import ScriptedEngine, says

P = "/v1/completions"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"
SECRET, ANSWER = "my secret", "so it is"


@dataclass
class Watched:
    """A service and everything that is seen of it."""

    service: TextService
    record: MemoryRecorder
    log: StringIO
    spans: InMemorySpanExporter

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    def count(self, metric: Metric, **labels: str) -> float | None:
        return self.record.value(metric, **labels)

    def http(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(create_api(self.service), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://service")

    def grpc(self) -> GrpcMethods:
        methods = GrpcMethods()
        methods.service = self.service
        return methods


@pytest.fixture
def log() -> Iterator[StringIO]:
    stream = StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    ours = logging.getLogger("meteora_dist")
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    yield stream
    ours.removeHandler(handler)
    ours.setLevel(level)


@pytest.fixture
def watch(make_service: MakeService, log: StringIO) -> Any:
    def make(engine: ScriptedEngine, traced: bool = False) -> Watched:
        spans, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(spans))
        record = MemoryRecorder()
        tracer = provider.get_tracer("test") if traced else None
        return Watched(make_service(engine, observer=Observer(record, tracer)), record, log, spans)

    return make


@pytest.fixture
def yes(watch: Any, tokenizer: TextTokenizer) -> Watched:
    made: Watched = watch(says(tokenizer, ANSWER))
    return made


async def stream(methods: GrpcMethods, request: pb.GenerateRequest, context: Context) -> list[str]:
    return [message.choice.text async for message in methods.GenerateStream(request, context)]


async def test_every_http_call_ends_in_one_line_and_its_counts(yes: Watched) -> None:
    async with yes.http() as http:
        for streamed in (False, True):
            body = {"prompt": SECRET, "model": "wide", "stream": streamed}
            got = await http.post(P, json=body, headers={"x-request-id": "mine-1"})
            assert got.status_code == 200
            assert f"cmpl-{yes.lines[-1]['completion_id']}" in got.text
    assert len(yes.lines) == 2
    for line in yes.lines:
        assert line["message"] == "request"
        assert (line["request_id"], line["protocol"], line["operation"]) == ("mine-1", "http", f"POST {P}")
        assert (line["model"], line["mode"], line["outcome"], line["status"]) == ("wide", "named", "ok", 200)
        assert (line["prompt_tokens"], line["completion_tokens"]) == (len(SECRET), len(ANSWER) + 1)
        assert 0 < line["ttft_ms"] <= line["duration_ms"]
        assert line["key"] == "anonymous"
        assert not {"code", "trace_id"} & set(line)
    labels = {"protocol": "http", "mode": "named"}
    assert yes.count(metrics.REQUESTS, **labels, outcome="ok") == 2
    assert yes.count(metrics.PROMPT_TOKENS, **labels) == 2 * len(SECRET)
    assert yes.count(metrics.COMPLETION_TOKENS, **labels) == 2 * (len(ANSWER) + 1)
    assert len(yes.record.of(metrics.FIRST_TOKEN_SECONDS, **labels)) == 2
    assert len(yes.record.of(metrics.QUEUE_SECONDS, **labels)) == 2
    assert len(yes.record.of(metrics.INTER_TOKEN_SECONDS, **labels)) == 2 * len(ANSWER)
    assert len(yes.record.of(metrics.REQUEST_SECONDS, **labels)) == 2
    assert yes.service.observer.live == 0


async def test_grpc_calls_are_the_same(yes: Watched) -> None:
    request = pb.GenerateRequest(prompt=SECRET, model="base")
    whole = await yes.grpc().Generate(request, Context(metadata=(("x-request-id", "mine-2"), ("x-bin", b"\xff"))))
    await stream(yes.grpc(), request, Context())
    first, second = yes.lines
    assert first["completion_id"] == whole.id
    # Serve gives those an id that have none, and sends it back.
    assert [line["request_id"] for line in yes.lines] == ["mine-2", "serve-1"]
    assert [line["operation"] for line in yes.lines] == ["Generate", "GenerateStream"]
    assert (first["mode"], second["completion_tokens"]) == ("base", len(ANSWER) + 1)
    assert yes.count(metrics.REQUESTS, protocol="grpc", mode="base", outcome="ok") == 2


@pytest.mark.parametrize(
    ("sent", "kept"), [("a-1.b:c", True), (None, False), ("", False), ("x" * 129, False), ("a\tb", False), ("é", False)]
)
async def test_an_id_is_the_callers_if_it_is_sane(yes: Watched, sent: str | None, kept: bool) -> None:
    headers = [] if sent is None else [(b"x-request-id", sent.encode("latin-1"))]
    async with yes.http() as http:
        got = await http.get("/v1/models", headers=headers)
    logged = yes.lines[0]["request_id"]
    if kept:
        # Serve's proxy echoes it: a second one would be joined to the first.
        assert (logged, "x-request-id" in got.headers) == (sent, False)
    else:
        assert len(logged) == 32
        assert got.headers["x-request-id"] == logged != sent


async def test_refused_calls_are_counted_by_what_came_of_them(yes: Watched) -> None:
    async with yes.http() as http:
        await http.post(P, json={"prompt": SECRET, "max_tokens": -1})
        await http.post(P, content=SECRET)
        await http.post(P, json={"prompt": SECRET, "model": SECRET})
        await http.get(f"/v1/{SECRET}?{SECRET}")
    with pytest.raises(CallFailed):
        await yes.grpc().Generate(pb.GenerateRequest(prompt=SECRET * 99), Context())
    codes = ["invalid_value", "invalid_value", "model_not_found", "unknown_url", "context_length_exceeded"]
    assert [line["code"] for line in yes.lines] == codes
    assert [line["operation"] for line in yes.lines[-2:]] == ["unmatched", "Generate"]
    assert yes.count(metrics.REQUESTS, protocol="http", mode="none", outcome="invalid") == 4
    assert yes.count(metrics.REQUESTS, protocol="grpc", mode="auto", outcome="invalid") == 1
    assert yes.count(metrics.PROMPT_TOKENS, protocol="grpc", mode="auto") is None


async def test_callers_are_named_and_those_without_a_key_are_denied(
    make_service: MakeService, tokenizer: TextTokenizer, log: StringIO, tmp_path: Path
) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump([{"name": "team-a", "sha256": key_digest("the key")}]))
    record = MemoryRecorder()
    service = make_service(says(tokenizer, ANSWER), gate=Gate(Keyring(file)), observer=Observer(record))
    seen = Watched(service, record, log, InMemorySpanExporter())
    async with seen.http() as http:
        for key in ("the key", "another"):
            await http.post(P, json={"prompt": SECRET}, headers={"authorization": f"Bearer {key}"})
    with pytest.raises(CallFailed):
        await seen.grpc().Generate(pb.GenerateRequest(prompt=SECRET), Context())
    told = [(line.get("key"), line["outcome"], line.get("code")) for line in seen.lines]
    assert told == [("team-a", "ok", None), (None, "denied", "invalid_api_key"), (None, "denied", "invalid_api_key")]
    assert seen.count(metrics.REQUESTS, protocol="grpc", mode="none", outcome="denied") == 1
    assert "the key" not in seen.log.getvalue()


async def test_probes_leave_no_trace(yes: Watched) -> None:
    async with yes.http() as http:
        for path in ("/healthz", "/readyz", "/livez"):
            assert (await http.get(path)).status_code == 200
    assert (yes.lines, yes.record.values) == ([], {})


async def test_readiness_follows_the_engine_and_liveness_does_not(watch: Any) -> None:
    seen: Watched = watch(ScriptedEngine([], healthy=EngineUnavailable("rebuilding")))
    async with seen.http() as http:
        status = {path: (await http.get(path)).status_code for path in ("/healthz", "/readyz", "/livez")}
    assert status == {"/healthz": 503, "/readyz": 503, "/livez": 200}


async def test_a_replica_that_drains_is_not_ready(yes: Watched) -> None:
    assert await yes.service.gate.drain(1)
    async with yes.http() as http:
        assert [(await http.get(path)).status_code for path in ("/readyz", "/livez")] == [503, 200]


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_engine_that_dies_is_the_outcome(watch: Any, tokenizer: TextTokenizer, streamed: bool) -> None:
    seen: Watched = watch(says(tokenizer, ANSWER, error=EngineUnavailable("gone")))
    async with seen.http() as http:
        await http.post(P, json={"prompt": SECRET, "stream": streamed})
    (line,) = seen.lines
    assert (line["outcome"], line["code"], line["status"]) == ("unavailable", "engine_unavailable", 503)
    assert line["completion_tokens"] == len(ANSWER)
    assert seen.record.of(metrics.REQUEST_SECONDS, protocol="http", mode="auto") == []


async def test_callers_who_go_away_are_cancelled(watch: Any, tokenizer: TextTokenizer) -> None:
    engine = says(tokenizer, ANSWER)
    seen: Watched = watch(engine)
    live = seen.grpc().GenerateStream(pb.GenerateRequest(prompt=SECRET), Context())
    await anext(live)
    assert seen.service.observer.live == 1
    await live.aclose()  # type: ignore[attr-defined]
    engine.pause = asyncio.Event()
    async with seen.http() as http:
        asked = asyncio.ensure_future(http.post(P, json={"prompt": SECRET}))
        while len(engine.seen) < 2:
            await asyncio.sleep(0.01)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
    await _disconnected_stream(seen)
    assert [line["outcome"] for line in seen.lines] == ["cancelled"] * 3
    assert seen.count(metrics.REQUESTS, protocol="grpc", mode="auto", outcome="cancelled") == 1
    assert seen.count(metrics.REQUESTS, protocol="http", mode="auto", outcome="cancelled") == 2
    assert seen.service.observer.live == 0


async def _disconnected_stream(seen: Watched) -> None:
    """As a server tells an application that its client has closed the connection in the middle of a stream."""
    seen.service._engine.pause = None  # type: ignore[attr-defined]
    body = json.dumps({"prompt": SECRET, "stream": True}).encode()
    gone = asyncio.Event()
    received = _messages(body, gone)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            gone.set()
            await asyncio.sleep(0.05)

    scope = {"type": "http", "method": "POST", "path": P, "headers": [], "query_string": b"", "root_path": ""}
    scope |= {"asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "server": ("service", 80)}
    await create_api(seen.service)(scope, received, send)


def _messages(body: bytes, gone: asyncio.Event) -> Callable[[], Awaitable[dict[str, Any]]]:
    """What a server hands to an application, message by message."""
    asked = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive() -> dict[str, Any]:
        for message in asked:
            return message
        await gone.wait()
        return {"type": "http.disconnect"}

    return receive


async def test_no_text_is_logged_whatever_happens(watch: Any, tokenizer: TextTokenizer) -> None:
    for error in (None, EngineUnavailable("gone"), RuntimeError("a bug")):
        seen: Watched = watch(says(tokenizer, ANSWER, error=error), traced=True)
        request = pb.GenerateRequest(prompt=SECRET, stop=[SECRET])
        async with seen.http() as http:
            await http.post(P, json={"prompt": SECRET, "stop": SECRET})
            await http.post(P, json={"prompt": SECRET, "stream": True})
            await http.post(P, json={"prompt": SECRET, SECRET: SECRET})
        for call in (seen.grpc().Generate(request, Context()), stream(seen.grpc(), request, Context())):
            await asyncio.gather(call, return_exceptions=True)
    requests = [line for line in seen.lines if line["message"] == "request"]
    assert len(requests) == 15
    assert any("RuntimeError: a bug" in line.get("exception", "") for line in seen.lines)
    written = seen.log.getvalue() + "".join(span.to_json() for span in seen.spans.get_finished_spans())
    assert "wide" in written
    assert SECRET not in written
    assert ANSWER not in written


@pytest.mark.parametrize("protocol", ["http", "grpc"])
async def test_a_span_says_what_the_routing_came_to(watch: Any, tokenizer: TextTokenizer, protocol: str) -> None:
    engine = says(tokenizer, ANSWER)
    seen: Watched = watch(engine, traced=True)
    if protocol == "http":
        async with seen.http() as http:
            got = await http.post(P, json={"prompt": SECRET}, headers={"traceparent": PARENT})
        assert "routing" not in got.json()["choices"][0]
    else:
        context = Context(metadata=(("traceparent", PARENT),))
        answer = await seen.grpc().Generate(pb.GenerateRequest(prompt=SECRET), context)
        assert not answer.choices[0].HasField("routing")
    (span,) = seen.spans.get_finished_spans()
    assert span.context is not None
    assert span.parent is not None
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT.split("-")[2])
    assert seen.lines[0]["trace_id"] == TRACE
    had = dict(span.attributes or {})
    assert had["meteora.dominating_expert"] == "wide"
    assert had["meteora.top_experts"] == ("wide", "rooted", "plain", "partial")
    assert had["meteora.top_shares"] == (0.6, 0.2, 0.1, 0.1)
    assert (had["gen_ai.request.model"], had["meteora.mode"], had["meteora.outcome"]) == ("auto", "auto", "ok")
    assert (had["gen_ai.usage.input_tokens"], had["gen_ai.usage.output_tokens"]) == (len(SECRET), len(ANSWER) + 1)
    assert had["meteora.request_id"] == seen.lines[0]["request_id"]
    assert [event.name for event in span.events] == ["first token"]


async def test_nobody_else_makes_spans_of_a_call(yes: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(yes.spans))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    yes.service.observer.tracer = provider.get_tracer("test")
    async with yes.http() as http:
        await http.post(f"{P}?{SECRET}", json={"prompt": SECRET})
        await http.get("/readyz")
    assert [span.name for span in yes.spans.get_finished_spans()] == [f"POST {P}"]


async def test_shares_are_computed_for_those_only_who_want_them(watch: Any, tokenizer: TextTokenizer) -> None:
    engine = says(tokenizer, ANSWER)
    for traced in (False, True):
        async with watch(engine, traced).http() as http:
            # A caller's own trace is not sampled: nobody wants it recorded.
            unsampled = {"traceparent": PARENT[:-1] + "0"}
            await http.post(P, json={"prompt": SECRET}, headers=unsampled)
            await http.post(P, json={"prompt": SECRET})
    assert [request.trace for request in engine.seen] == [False, False, False, True]


async def test_a_failed_call_has_a_failed_span(watch: Any, tokenizer: TextTokenizer) -> None:
    seen: Watched = watch(says(tokenizer, ANSWER, error=EngineUnavailable("gone")), traced=True)
    context = Context()
    with pytest.raises(CallFailed):
        await seen.grpc().Generate(pb.GenerateRequest(prompt=SECRET), context)
    (span,) = seen.spans.get_finished_spans()
    assert (context.code, span.status.is_ok) == (grpc.StatusCode.UNAVAILABLE, False)
    assert span.status.description == "engine_unavailable"
