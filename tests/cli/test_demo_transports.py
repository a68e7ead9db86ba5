"""The demo's four ways of asking, against the service's real interfaces over an engine that says what it is told."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc
import httpx
import pytest

from meteora_dist.bank import Bank
from meteora_dist.cli.demo_questions import TRANSPORTS, Question, Transport
from meteora_dist.cli.demo_replies import AskFailed, read_events
from meteora_dist.cli.demo_transports import Client
from meteora_dist.errors import EngineUnavailable
from meteora_dist.evaluation.tasks import TaskRow
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.grpc_api import GrpcMethods
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.limits import Limits
from meteora_dist.serving.proto.meteora.v1.inference_pb2_grpc import InferenceStub, add_InferenceServicer_to_server
from meteora_dist.serving.request import Turn
from meteora_dist.serving.service import TextService
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.scripted import ScriptedEngine, says

Connect = Callable[[ScriptedEngine], AbstractAsyncContextManager[Client]]


@pytest.fixture(scope="module")
def tokenizer(tiny_base) -> TextTokenizer:
    return TextTokenizer.open(tiny_base)


@pytest.fixture
def connect(tokenizer: TextTokenizer, tiny_bank: Bank) -> Connect:
    """A client of both interfaces of a service over the given engine."""

    @asynccontextmanager
    async def connected(engine: ScriptedEngine) -> AsyncIterator[Client]:
        gate = Gate(None, anonymous=True)
        service = TextService(engine, tokenizer, Catalog(tiny_bank.manifest), Limits(max_model_len=128), gate)
        methods = GrpcMethods()
        methods.service = service
        server = grpc.aio.server()
        add_InferenceServicer_to_server(methods, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        transport = httpx.ASGITransport(create_api(service))
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://service") as http,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            yield Client(http, InferenceStub(channel))
        await server.stop(grace=None)

    return connected


def question(transport: Transport, prompt: str = "2 + 2?") -> Question:
    return Question((TaskRow(prompt, "four"),), ("sums",), transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_every_transport_brings_the_answer_and_the_share_of_every_token(
    transport: Transport, connect: Connect, tokenizer: TextTokenizer, tiny_bank: Bank
) -> None:
    engine = says(tokenizer, "four")
    async with connect(engine) as client:
        (reply,) = await client.ask(question(transport))
    assert (reply.text, reply.dominating) == ("four", tiny_bank.names[1])
    assert [token.text for token in reply.tokens] == ["f", "o", "u", "r", ""]
    assert {token.dominating for token in reply.tokens} == {1}
    assert reply.tokens[0].shares == pytest.approx((0.1, 0.6, 0.2, 0.1))
    (asked,) = engine.seen
    assert (asked.max_tokens, asked.sampling.temperature, asked.routing.mode) == (32, 0.0, "auto")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_later_turn_has_the_earlier_ones_as_its_context(
    transport: Transport, connect: Connect, tokenizer: TextTokenizer
) -> None:
    engine = says(tokenizer, "yes")
    talk = Question((TaskRow("a?", "yes"), TaskRow("b?", "no")), ("sums", "sums"), transport, conversation=True)
    async with connect(engine) as client:
        replies = await client.ask(talk)
    assert [reply.text for reply in replies] == ["yes", "yes"]
    prompts = [list(asked.prompt_ids) for asked in engine.seen]
    said = [Turn("user", "a?"), Turn("assistant", "yes"), Turn("user", "b?")]
    assert prompts == [list(tokenizer.encode(tuple(said[:1]))), list(tokenizer.encode(tuple(said)))]


async def test_all_transports_send_the_same_request(connect: Connect, tokenizer: TextTokenizer) -> None:
    engine = says(tokenizer, "x")
    async with connect(engine) as client:
        for transport in TRANSPORTS:
            await client.ask(question(transport))
    assert len({(asked.prompt_ids, asked.max_tokens, asked.routing, asked.trace) for asked in engine.seen}) == 1


@pytest.mark.parametrize(
    ("transport", "says_why"),
    [
        ("http", "HTTP 503: the ranks are gone"),
        ("http_stream", "HTTP 503: the ranks are gone"),
        ("grpc", "UNAVAILABLE: .*the ranks are gone"),
        ("grpc_stream", "UNAVAILABLE: .*the ranks are gone"),
    ],
)
async def test_a_refused_request_says_why(transport: Transport, says_why: str, connect: Connect) -> None:
    async with connect(ScriptedEngine([], error=EngineUnavailable("the ranks are gone"))) as client:
        with pytest.raises(AskFailed, match=says_why):
            await client.ask(question(transport))


@pytest.mark.parametrize("transport", ["http_stream", "grpc_stream"])
async def test_a_stream_that_breaks_off_is_a_failure(
    transport: Transport, connect: Connect, tokenizer: TextTokenizer
) -> None:
    broken = ScriptedEngine(list(tokenizer.encode("fo")), error=EngineUnavailable("a rank died"))
    async with connect(broken) as client:
        with pytest.raises(AskFailed, match="a rank died"):
            await client.ask(question(transport))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_prompt_that_does_not_fit_is_a_failure(
    transport: Transport, connect: Connect, tokenizer: TextTokenizer
) -> None:
    async with connect(says(tokenizer, "four")) as client:
        with pytest.raises(AskFailed, match="the context holds 128 tokens"):
            await client.ask(question(transport, "long " * 40))


async def test_the_experts_are_the_banks(connect: Connect, tokenizer: TextTokenizer, tiny_bank: Bank) -> None:
    async with connect(says(tokenizer, "four")) as client:
        assert await client.experts() == tiny_bank.names


async def test_an_answer_without_a_trace_is_a_failure() -> None:
    choice = {"message": {"content": "four"}, "finish_reason": "stop", "routing": {"dominating": None, "tokens": []}}
    body = {"choices": [choice], "usage": {"completion_tokens": 2}}
    await expect_failure(body, "the routing trace has 0 tokens, but 2 were produced")


async def test_an_answer_of_another_shape_is_a_failure() -> None:
    await expect_failure({"choices": [{}], "usage": None}, "another shape")


async def expect_failure(body: dict[str, object], reason: str) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=body))
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://service") as http,
        grpc.aio.insecure_channel("127.0.0.1:1") as channel,
    ):
        with pytest.raises(AskFailed, match=reason):
            await Client(http, InferenceStub(channel)).ask(question("http"))


def test_events_need_their_end_mark() -> None:
    chunk = json.dumps({"choices": []})
    assert read_events([chunk, "[DONE]"]) == [{"choices": []}]
    with pytest.raises(AskFailed, match="broke off after 1 events: it has no end mark"):
        read_events([chunk])
    with pytest.raises(AskFailed, match="broke off after 0 events"):
        read_events([])
