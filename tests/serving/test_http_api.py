"""The HTTP interface over a scripted engine: shapes of answers, streams and errors."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from meteora_dist.errors import EngineUnavailable
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.conftest import MakeService
from tests.serving.scripted import ScriptedEngine, says

Connect = Callable[[ScriptedEngine], httpx.AsyncClient]

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def connect(make_service: MakeService) -> Connect:
    """A client of the application over an engine."""

    def make(engine: ScriptedEngine) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(create_api(make_service(engine)), raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://test")

    return make


@pytest.fixture
def yes(tokenizer: TextTokenizer, connect: Connect) -> httpx.AsyncClient:
    """A client of an engine that says yes."""
    return connect(says(tokenizer, "yes"))


def events(body: str) -> list[Any]:
    """The stream's events; each is one data line and an empty one."""
    *blocks, end = body.split("\n\n")
    assert end == ""
    assert blocks.pop() == "data: [DONE]"
    return [json.loads(block.removeprefix("data: ")) for block in blocks]


async def test_completions_answers_in_openais_shape(yes: httpx.AsyncClient) -> None:
    got = (await yes.post("/v1/completions", json={"prompt": "Hi"})).json()
    assert got.pop("id").startswith("cmpl-")
    assert got.pop("created") > 1_700_000_000
    assert got == {
        "object": "text_completion",
        "model": "auto",
        "choices": [{"index": 0, "text": "yes", "logprobs": None, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6},
    }


async def test_chat_answers_in_openais_shape(yes: httpx.AsyncClient) -> None:
    got = (await yes.post("/v1/chat/completions", json={**CHAT, "model": "plain"})).json()
    assert (got["object"], got["model"]) == ("chat.completion", "plain")
    message = {"role": "assistant", "content": "yes", "refusal": None}
    assert got["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]


async def test_a_completion_stream_is_events_and_done(yes: httpx.AsyncClient) -> None:
    got = await yes.post("/v1/completions", json={"prompt": "Hi", "stream": True})
    assert got.headers["content-type"].startswith("text/event-stream")
    chunks = events(got.text)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["y", "e", "s", ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert all("usage" not in chunk for chunk in chunks)


async def test_a_chat_stream_says_who_speaks_and_ends_with_the_usage_asked_for(yes: httpx.AsyncClient) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}, "max_completion_tokens": 2}
    *chunks, usage = events((await yes.post("/v1/chat/completions", json=CHAT | options)).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": "y"}, {"content": "e"}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 2


async def test_half_characters_make_no_event(tokenizer: TextTokenizer, connect: Connect) -> None:
    client = connect(says(tokenizer, "é🦙"))
    chunks = events((await client.post("/v1/completions", json={"prompt": "Hi", "stream": True})).text)
    assert [chunk["choices"][0]["text"] for chunk in chunks][1:] == ["é", "🦙", ""]


async def test_the_trace_is_in_the_choice(yes: httpx.AsyncClient, tokenizer: TextTokenizer) -> None:
    body = {"prompt": "Hi", "max_tokens": 2, "routing": {"trace": True}}
    choice = (await yes.post("/v1/completions", json=body)).json()["choices"][0]
    y, e = tokenizer.encode("ye")
    shares = [0.1, 0.6, 0.2, 0.1]
    assert choice["routing"] == {
        "experts": ["plain", "wide", "rooted", "partial"],
        "dominating": "wide",
        "tokens": [{"token": "y", "id": y, "shares": shares}, {"token": "e", "id": e, "shares": shares}],
    }
    chunks = events((await yes.post("/v1/completions", json=body | {"stream": True})).text)
    assert [len(chunk["choices"][0]["routing"]["tokens"]) for chunk in chunks] == [1, 1]
    assert [token for chunk in chunks for token in chunk["choices"][0]["routing"]["tokens"]] == choice["routing"][
        "tokens"
    ]


async def test_a_trace_of_the_layers_is_in_the_choice(yes: httpx.AsyncClient) -> None:
    body = {"prompt": "Hi", "max_tokens": 2, "routing": {"trace": "layers"}}
    choice = (await yes.post("/v1/completions", json=body)).json()["choices"][0]
    for token in choice["routing"]["tokens"]:
        assert (token["layer_experts"], token["layer_shares"]) == ([1, 3, -1], [0.75, 0.5, 0.0])
    chunks = events((await yes.post("/v1/completions", json=body | {"stream": True})).text)
    assert [chunk["choices"][0]["routing"]["tokens"][0] for chunk in chunks] == choice["routing"]["tokens"]


async def test_models_lists_modes_and_experts(yes: httpx.AsyncClient) -> None:
    got = (await yes.get("/v1/models")).json()
    assert got["object"] == "list"
    assert [model["id"] for model in got["data"]] == [
        "auto",
        "auto-sequence",
        "base",
        "plain",
        "wide",
        "rooted",
        "partial",
    ]
    assert set(got["data"][0]) == {"id", "object", "created", "owned_by"}
    assert (await yes.get("/v1/models/wide")).json() == got["data"][4]


async def test_content_parts_and_harmless_fields_are_taken(tokenizer: TextTokenizer, connect: Connect) -> None:
    engine = says(tokenizer, "yes")
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    body = {"messages": [{"role": "developer", "content": parts}], "user": "me", "n": 1, "stop": None, "seed": None}
    assert (await connect(engine).post("/v1/chat/completions", json=body)).status_code == 200
    assert engine.seen[0].prompt_ids == tokenizer.encode("<system>Hi\n<assistant>")


P = "/v1/completions"
C = "/v1/chat/completions"
NEST = json.loads('{"items": ' * 150 + "{}" + "}" * 150)
DEEP = {"type": "json_schema", "json_schema": {"name": "x", "schema": NEST}}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "message"),
    [
        (P, b"{", 400, None, "not valid JSON"),
        (P, b"", 400, None, "not valid JSON"),
        (P, b"\xff", 400, None, "not valid JSON"),
        (P, b"[" * 9999, 400, None, "not valid JSON"),
        (P, b"[]", 400, None, "the body: input should be an object"),
        (P, {}, 400, "prompt", "field required"),
        (P, {"prompt": "a", "promt": 1}, 400, "promt", "promt is not a field"),
        (P, {"prompt": ["a", 5]}, 400, "prompt", "must be a text, a list of texts"),
        (P, {"prompt": []}, 400, "prompt", "at least one prompt"),
        (P, {"prompt": [[1], []]}, 400, "prompt", "no tokens"),
        (P, {"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "max_tokens is -1"),
        (P, {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "valid integer"),
        (P, {"prompt": "a", "temperature": 3}, 400, "temperature", "between 0 and 2"),
        (P, {"prompt": "a", "stop": [1]}, 400, "stop", "valid string"),
        (P, {"prompt": ["a", "b"], "n": 17}, 400, "n", "at most 32 answers"),
        (P, {"prompt": "a", "top_k": 10**30}, 400, "top_k", "at least 1, or 0"),
        (P, {"prompt": "a", "repetition_penalty": 1e300}, 400, "repetition_penalty", "between 0.01 and 100"),
        (P, {"prompt": "a", "routing": {"temperature": 1e-320}}, 400, "routing.temperature", "between 0.001 and 1000"),
        (P, {"prompt": "a", "logit_bias": {"9" * 5000: 1}}, 400, "logit_bias", "is no token id"),
        (P, b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400, None, ""),
        (P, {"prompt": "a", "response_format": DEEP}, 400, "response_format", "recursion limit"),
        (P, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "'x' is no token id"),
        (P, {"prompt": "a", "routing": {"k": 2}}, 400, "routing.k", "routing.k is not a field"),
        (P, {"prompt": "a", "routing": {"trace": "all"}}, 400, "routing.trace", "true, false or 'layers'"),
        (P, {"prompt": "a", "routing": {"top_k": 0}}, 400, "routing.top_k", "at least 1"),
        (P, {"prompt": "a", "stream_options": {}}, 400, "stream_options", "only allowed when stream"),
        (P, {"prompt": "a", "model": "nobody"}, 404, "model", "served are auto, auto-sequence, base"),
        (P, {"prompt": "x" * 99}, 400, "prompt", "holds 64 tokens"),
        (C, {"messages": []}, 400, "messages", "at least 1 item"),
        (C, {"messages": [{"role": "tool", "content": ""}]}, 400, "messages.0.role", "'system', 'developer'"),
        (C, {"messages": [{"role": "user", "content": 5}]}, 400, "messages.0.content", "valid string"),
        (C, CHAT | {"prompt": "a"}, 400, "prompt", "not a field"),
        (C, CHAT | {"max_tokens": 1, "max_completion_tokens": 1}, 400, "max_tokens", "exclude"),
    ],
)
async def test_bad_requests_get_an_openai_error(
    yes: httpx.AsyncClient, path: str, body: Any, status: int, param: str | None, message: str
) -> None:
    got = await yes.post(path, content=body if isinstance(body, bytes) else json.dumps(body))
    error = got.json()["error"]
    assert (got.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert message in error["message"]


async def test_messages_do_not_grow_with_what_was_sent(yes: httpx.AsyncClient) -> None:
    got = await yes.post(P, json={"prompt": "a", "model": "x" * 100_000})
    assert (got.status_code, len(got.json()["error"]["message"])) == (404, 1000)


@pytest.mark.parametrize("stream", [False, True])
async def test_error_codes_are_those_clients_know(yes: httpx.AsyncClient, stream: bool) -> None:
    async def code(body: dict[str, Any]) -> str:
        return str((await yes.post(P, json=body | {"stream": stream})).json()["error"]["code"])

    assert await code({"prompt": "a", "model": "nobody"}) == "model_not_found"
    assert await code({"prompt": "x" * 99}) == "context_length_exceeded"
    assert await code({"prompt": "a", "max_tokens": -1}) == "invalid_value"


async def test_unknown_routes_and_methods_are_openai_errors(yes: httpx.AsyncClient) -> None:
    missing = await yes.get("/v1/nowhere")
    assert (missing.status_code, missing.json()["error"]["message"]) == (404, "there is no /v1/nowhere here")
    wrong = await yes.get(P)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert (await yes.get("/v1/models/nobody")).json()["error"]["code"] == "model_not_found"


async def test_health_follows_the_engine(connect: Connect) -> None:
    engine = ScriptedEngine([])
    client = connect(engine)
    assert (await client.get("/healthz")).status_code == 200
    engine.healthy = EngineUnavailable("restarting")
    got = await client.get("/healthz")
    assert (got.status_code, got.headers["retry-after"]) == (503, "5")
    assert got.json()["error"]["message"] == "restarting"


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_is_gone_is_503(connect: Connect, stream: bool) -> None:
    client = connect(ScriptedEngine([], error=EngineUnavailable("restarting")))
    got = await client.post(P, json={"prompt": "a", "stream": stream})
    assert (got.status_code, got.headers["retry-after"]) == (503, "5")
    assert got.json()["error"]["code"] == "engine_unavailable"


async def test_an_engine_that_dies_in_a_stream_ends_it_with_an_error(
    tokenizer: TextTokenizer, connect: Connect
) -> None:
    client = connect(says(tokenizer, "ye", error=EngineUnavailable("restarting")))
    got = await client.post(P, json={"prompt": "a", "stream": True})
    *_, last, end = got.text.split("\n\n")
    assert (got.status_code, end) == (200, "")
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_unavailable"


async def test_a_fault_of_ours_is_500_without_detail(connect: Connect) -> None:
    client = connect(ScriptedEngine([], error=RuntimeError("/srv/secret")))
    got = await client.post(P, json={"prompt": "a"})
    assert (got.status_code, got.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in got.text


async def test_too_many_requests_are_429(tokenizer: TextTokenizer, connect: Connect) -> None:
    pause = asyncio.Event()
    engine = says(tokenizer, "x", pause=pause)
    client = connect(engine)
    running = [asyncio.ensure_future(client.post(P, json={"prompt": "a"})) for _ in range(2)]
    while len(engine.seen) < 2:
        await asyncio.sleep(0.01)
    got = await client.post(P, json={"prompt": "a"})
    pause.set()
    assert (got.status_code, got.headers["retry-after"]) == (429, "1")
    assert [(await answer).status_code for answer in running] == [200, 200]


async def test_the_document_describes_every_route_and_resolves(yes: httpx.AsyncClient) -> None:
    document = (await yes.get("/openapi.json")).json()
    assert set(document["paths"]) == {P, C, "/v1/models", "/v1/models/{name}", "/healthz", "/readyz", "/livez"}
    schemas = document["components"]["schemas"]
    assert (await yes.get("/openapi.json")).text.count("#/$defs/") == 0
    for name in re.findall(r"#/components/schemas/(\w+)", json.dumps(document)):
        assert name in schemas
    body = document["paths"][C]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatBody"}
    assert schemas["ChatBody"]["required"] == ["messages"]
    assert schemas["ChatBody"]["properties"]["temperature"]["maximum"] == 2.0
    for path in document["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
            assert operation["operationId"]
