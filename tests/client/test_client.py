"""The client over both protocols, against the real interfaces over a scripted engine."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

import grpc
import httpx
import pytest

from meteora_dist.bank.manifest import RouterSettings
from meteora_dist.client import (
    AsyncClient,
    CallFailed,
    CallTimedOut,
    Client,
    Piece,
    Retry,
    Routing,
    TokenLogprob,
    Usage,
)
from meteora_dist.client.failures import Failed, of_grpc, of_http
from meteora_dist.errors import EngineUnavailable, ExpertNotFound, InvalidRequest, Unauthenticated
from meteora_dist.moe.routing import named
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.grpc_api import CallFailed as MethodFailed
from meteora_dist.serving.grpc_api import GrpcMethods
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.proto.meteora.v1.inference_pb2_grpc import add_InferenceServicer_to_server
from meteora_dist.serving.status import INTERNAL, STATUS_OF, Failure
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.conftest import MakeService
from tests.serving.scripted import ScriptedEngine, says

EXPERTS = ("plain", "wide", "rooted", "partial")
SOON = Retry(first_s=0.001, longest_s=60.0)
NEVER = Retry(times=0)

Connect = Callable[..., Awaitable[AsyncClient]]


class Aborting(grpc.aio.ServerInterceptor):
    """Ends failed calls as a plain gRPC server wants it: by ``abort``.

    Attributes:
        keys: The ``authorization`` of every call.
    """

    def __init__(self) -> None:
        self.keys: list[object] = []

    async def intercept_service(self, following: Any, details: Any) -> Any:
        self.keys.append(dict(details.invocation_metadata).get("authorization"))
        handler = await following(details)
        serializers = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }

        async def whole(request: Any, context: Any) -> Any:
            try:
                return await handler.unary_unary(request, context)
            except MethodFailed:
                await context.abort(context.code(), context.details())

        async def pieces(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                async with aclosing(handler.unary_stream(request, context)) as messages:
                    async for message in messages:
                        yield message
            except MethodFailed:
                await context.abort(context.code(), context.details())

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(pieces, **serializers)
        return grpc.unary_unary_rpc_method_handler(whole, **serializers)


async def serve(methods: GrpcMethods, stack: AsyncExitStack, aborting: Aborting | None = None) -> str:
    """A gRPC server's URL."""
    server = grpc.aio.server(interceptors=[aborting or Aborting()])
    add_InferenceServicer_to_server(methods, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    stack.push_async_callback(server.stop, None)
    return f"grpc://127.0.0.1:{port}"


@pytest.fixture(params=["http", "grpc"])
async def connect(request: pytest.FixtureRequest, make_service: MakeService) -> AsyncIterator[Connect]:
    """Opens a client of a service over an engine."""
    async with AsyncExitStack() as stack:

        async def make(engine: ScriptedEngine, live: int = 2, gate: Gate | None = None, **more: Any) -> AsyncClient:
            if request.param == "http":
                app = create_api(make_service(engine, live, gate))
                transport = httpx.ASGITransport(app, raise_app_exceptions=False)
                client = AsyncClient("http://test", http=transport, **more)
            else:
                methods = GrpcMethods()
                methods.service = make_service(engine, live, gate)
                client = AsyncClient(await serve(methods, stack), **more)
            return await stack.enter_async_context(client)

        yield make


async def all_of(client: AsyncClient, prompt: Any, **options: Any) -> list[Piece]:
    async with aclosing(client.stream(prompt, **options)) as pieces:
        return [piece async for piece in pieces]


async def test_whole_and_in_pieces(connect: Connect, tokenizer: TextTokenizer) -> None:
    client = await connect(says(tokenizer, "yes"))
    reply = await client.generate("Hi", max_tokens=8)
    assert (reply.text, reply.answers[0].finish_reason, reply.usage) == ("yes", "stop", Usage(2, 4))
    pieces = await all_of(client, "Hi", max_tokens=8)
    assert "".join(piece.text for piece in pieces) == "yes"
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert [piece.usage for piece in pieces] == [None] * (len(pieces) - 1) + [Usage(2, 4)]


async def test_every_kind_of_prompt(connect: Connect, tokenizer: TextTokenizer) -> None:
    engine = says(tokenizer, "yes")
    client = await connect(engine, live=4)
    chat = [{"role": "user", "content": "Hi"}]
    for prompt, lengths in (("Hi", [2]), (["Hi", "Hey"], [2, 3]), ([5, 6, 7], [3]), ([[5], [6, 7]], [1, 2])):
        engine.seen.clear()
        reply = await client.generate(prompt, max_tokens=8, n=2)
        assert [len(asked.prompt_ids) for asked in engine.seen] == [length for length in lengths for _ in range(2)]
        assert [answer.index for answer in reply.answers] == list(range(2 * len(lengths)))
        endings = [piece.index for piece in await all_of(client, prompt, max_tokens=8, n=2) if piece.finish_reason]
        assert sorted(endings) == list(range(2 * len(lengths)))
    assert (await client.generate(chat, max_tokens=8)).text == "yes"


async def test_every_option_reaches_the_engine(connect: Connect, tokenizer: TextTokenizer) -> None:
    engine = says(tokenizer, "yes")
    client = await connect(engine)
    sampling = {
        **{"temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125},
        **{"presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5},
    }
    blend = Routing(mode="blend", experts={"wide": 0.75, "plain": 0.25}, trace=True)
    await client.generate("Hi", max_tokens=3, seed=7, logit_bias={3: 1.5}, ignore_eos=True, routing=blend, **sampling)
    asked = engine.seen[-1]
    assert {name: getattr(asked.sampling, name) for name in sampling} == sampling
    assert (asked.max_tokens, asked.sampling.seed, asked.sampling.logit_bias) == (3, 7, ((3, 1.5),))
    assert (asked.ignore_eos, asked.trace, asked.routing.experts) == (True, True, ((1, 0.75), (0, 0.25)))
    await client.generate("Hi", max_tokens=3, routing=Routing(top_k=1, temperature=20.0), json={"type": "object"})
    asked = engine.seen[-1]
    assert (asked.routing.mode, asked.routing.top_k, asked.routing.temperature) == ("auto", 1, 20.0)
    by_schema = asked.grammar
    await client.generate("Hi", max_tokens=3, model="base", json=True)
    assert engine.seen[-1].routing.mode == "base"
    assert by_schema
    assert engine.seen[-1].grammar
    await client.generate("Hi", max_tokens=3, stop=["e"])
    assert (await client.generate("Hi", max_tokens=8, stop=["e"])).text == "y"


async def test_votes_are_asked_for_and_told(make_service: MakeService, tokenizer: TextTokenizer) -> None:
    engine = says(tokenizer, "yes")
    service = make_service(engine)
    fields = {"routers": RouterSettings(digest="0" * 64)}
    service.catalog = Catalog(service.catalog.manifest.model_copy(update=fields))
    methods = GrpcMethods()
    methods.service = service
    routing = Routing(mode="auto-sequence", vote="last", trace=True)
    async with AsyncExitStack() as stack:
        transport = httpx.ASGITransport(create_api(service), raise_app_exceptions=False)
        made = (AsyncClient("http://test", http=transport), AsyncClient(await serve(methods, stack)))
        for client in [await stack.enter_async_context(one) for one in made]:
            answer = (await client.generate("Hi", max_tokens=2, routing=routing)).answers[0]
            assert answer.routing is not None
            # The scripted layers vote 1, 3, 1, 2.
            assert answer.routing.votes == (0, 2, 1, 1)
            pieces = await all_of(client, "Hi", max_tokens=2, routing=routing)
            assert {piece.routing.votes for piece in pieces if piece.routing} == {(0, 2, 1, 1)}
    # The last layer's expert, and not the majority's.
    assert [asked.routing for asked in engine.seen if asked.vote is None] == [named(2)] * 4


async def test_traces_and_logprobs(connect: Connect, tokenizer: TextTokenizer) -> None:
    client = await connect(says(tokenizer, "yes"))
    for prompt in ("Hi", [{"role": "user", "content": "Hi"}]):
        options: dict[str, Any] = {"max_tokens": 2, "top_logprobs": 1, "routing": Routing(trace=True)}
        answer = (await client.generate(prompt, **options)).answers[0]
        assert answer.routing is not None
        assert (answer.routing.experts, answer.routing.dominating) == (EXPERTS, "wide")
        assert [token.text for token in answer.routing.tokens] == ["y", "e"]
        assert answer.routing.tokens[0].shares == pytest.approx((0.1, 0.6, 0.2, 0.1))
        assert answer.logprobs == tuple(TokenLogprob(text, -0.5, ((text, -0.5),)) for text in "ye")
        pieces = await all_of(client, prompt, **options)
        assert tuple(one for piece in pieces for one in piece.logprobs) == answer.logprobs
        traces = [piece.routing for piece in pieces if piece.routing]
        assert tuple(token for trace in traces for token in trace.tokens) == answer.routing.tokens


async def test_traces_of_the_layers(connect: Connect, tokenizer: TextTokenizer) -> None:
    client = await connect(says(tokenizer, "yes"))
    answer = (await client.generate("Hi", max_tokens=1, routing=Routing(trace="layers"))).answers[0]
    assert answer.routing is not None
    (token,) = answer.routing.tokens
    assert (token.layer_experts, token.layer_shares) == ((1, 3, -1), (0.75, 0.5, 0.0))


async def test_models(connect: Connect, tokenizer: TextTokenizer) -> None:
    client = await connect(says(tokenizer, ""))
    assert await client.models() == ("auto", "auto-sequence", "base", *EXPERTS)


async def test_refusals_are_our_errors(connect: Connect, tokenizer: TextTokenizer) -> None:
    engine = says(tokenizer, "yes")
    client = await connect(engine)
    for call in (client.generate, lambda prompt, **options: all_of(client, prompt, **options)):
        with pytest.raises(ExpertNotFound, match="no model 'nobody'"):
            await call("Hi", model="nobody")
        with pytest.raises(InvalidRequest, match="max_tokens is -1"):
            await call("Hi", max_tokens=-1)
        with pytest.raises(InvalidRequest, match="context holds 64"):
            await call("x" * 65, max_tokens=1)
    assert not engine.seen


async def test_keys_are_checked(connect: Connect, tokenizer: TextTokenizer) -> None:
    for key in (None, "wrong"):
        client = await connect(says(tokenizer, "yes"), gate=Gate(None), api_key=key)
        with pytest.raises(Unauthenticated, match="API key"):
            await client.generate("Hi")


async def test_a_busy_service_is_asked_again(connect: Connect, tokenizer: TextTokenizer) -> None:
    pause = asyncio.Event()
    client = await connect(says(tokenizer, "yes", pause=pause), live=1, retry=Retry(first_s=0.001))
    first = asyncio.ensure_future(client.generate("Hi", max_tokens=8))
    await asyncio.sleep(0.05)
    asking = [asyncio.ensure_future(client.generate("Hi", max_tokens=8)), asyncio.ensure_future(all_of(client, "Hi"))]
    await asyncio.sleep(0.2)
    assert not any(call.done() for call in asking)
    started = asyncio.get_running_loop().time()
    pause.set()
    assert (await first).text == "yes"
    await asyncio.gather(*asking)
    # the service said: after one second
    assert 0.5 < asyncio.get_running_loop().time() - started < 4


async def test_attempts_are_bounded_and_a_stream_that_has_begun_is_never_repeated(
    connect: Connect, tokenizer: TextTokenizer
) -> None:
    broken = says(tokenizer, "ye", error=EngineUnavailable("it broke"))
    client = await connect(broken, retry=SOON)
    heard: list[str] = []

    async def listen() -> None:
        async for piece in client.stream("Hi", max_tokens=8):
            heard.append(piece.text)

    with pytest.raises(EngineUnavailable, match="it broke"):
        await listen()
    assert ("".join(heard), len(broken.seen)) == ("ye", 1)
    silent = says(tokenizer, "", error=EngineUnavailable("it broke"))
    client = await connect(silent, retry=Retry(times=0))
    with pytest.raises(EngineUnavailable):
        await client.generate("Hi")
    client = await connect(silent, retry=Retry(longest_s=4.0))
    # It says five seconds, which is more than this caller waits.
    with pytest.raises(EngineUnavailable):
        await client.generate("Hi")
    assert len(silent.seen) == 2


async def test_time_is_bounded_and_what_runs_is_cancelled(connect: Connect, tokenizer: TextTokenizer) -> None:
    engine = says(tokenizer, "yes", pause=asyncio.Event())
    client = await connect(engine, timeout_s=0.3)
    for call in (client.generate("Hi"), all_of(client, "Hi")):
        with pytest.raises(CallTimedOut):
            await call
    await asyncio.sleep(0.1)
    assert len(engine.closed) == len(engine.seen) == 2


async def test_leaving_a_stream_cancels_it(make_service: MakeService, tokenizer: TextTokenizer) -> None:
    engine = says(tokenizer, "yes" * 10)
    methods = GrpcMethods()
    methods.service = make_service(engine)
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(AsyncClient(await serve(methods, stack)))
        async with aclosing(client.stream("Hi", max_tokens=40)) as pieces:
            await anext(pieces)
            engine.pause = asyncio.Event()
        await asyncio.sleep(0.2)
    assert len(engine.closed) == 1


async def test_keys_travel_with_every_call(make_service: MakeService, tokenizer: TextTokenizer) -> None:
    service, seen, aborting = make_service(says(tokenizer, "yes")), [], Aborting()

    class Noting(httpx.ASGITransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            seen.append(request.headers["authorization"])
            return await super().handle_async_request(request)

    methods = GrpcMethods()
    methods.service = service
    async with AsyncExitStack() as stack:
        url = await serve(methods, stack, aborting)
        for client in (
            AsyncClient("http://test", api_key="k", http=Noting(create_api(service))),
            AsyncClient(url, api_key="k"),
        ):
            await stack.enter_async_context(client)
            await client.models()
            await client.generate("Hi")
            await all_of(client, "Hi")
    assert seen == aborting.keys == ["Bearer k"] * 3


async def test_only_what_is_safe_is_tried_again() -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.path)
        kind = next(script)
        if isinstance(kind, type):
            raise kind("no", request=request)
        return httpx.Response(kind, text="from a proxy") if kind != 200 else httpx.Response(200, json={"data": []})

    async with AsyncClient("http://test", retry=SOON, http=httpx.MockTransport(answer)) as client:
        script = iter([httpx.ConnectError, httpx.ConnectTimeout, 429, 503, 200])
        assert await client.models() == ()
        for kind in (500, 408, 404, httpx.ReadError, httpx.RemoteProtocolError):
            seen.clear()
            script = iter([kind, 200])
            with pytest.raises(CallFailed, match=r"from a proxy|the connection failed"):
                await client.models()
            assert len(seen) == 1
        seen.clear()
        script = iter([503] * 9)
        with pytest.raises(CallFailed, match="HTTP 503"):
            await client.models()
        assert len(seen) == 1 + SOON.times


async def test_a_stream_that_is_cut_off_is_an_error() -> None:
    head = 'data: {"choices": [{"index": 0, "text": "a", "finish_reason": null, "logprobs": null}]}\n\n'
    answer = httpx.MockTransport(lambda request: httpx.Response(200, text=head))
    async with AsyncClient("http://test", http=answer) as client:
        with pytest.raises(CallFailed, match="cut off"):
            await all_of(client, "Hi")


async def test_nobody_there() -> None:
    for url in ("http://127.0.0.1:9", "grpc://127.0.0.1:9"):
        async with AsyncClient(url, retry=NEVER) as client:
            with pytest.raises(CallFailed):
                await client.generate("Hi")


def test_urls_are_checked() -> None:
    for url in ("127.0.0.1:8000", "ftp://host", "http://"):
        with pytest.raises(InvalidRequest, match="http://"):
            AsyncClient(url)


def test_pauses_double_are_random_and_end() -> None:
    retry = Retry(times=3, first_s=1.0, longest_s=3.0)
    for failures, least, most in ((1, 0.5, 1.0), (2, 1.0, 2.0), (3, 1.5, 3.0)):
        pauses = [retry.pause_s(failures, None) for _ in range(50)]
        assert all(pause is not None and least <= pause <= most for pause in pauses)
        assert len(set(pauses)) > 1
    pause = retry.pause_s(1, 2.0)
    assert pause is not None
    assert pause >= 2.5
    assert retry.pause_s(4, None) is retry.pause_s(1, 3.5) is None


@pytest.mark.parametrize("kind", [kind for kind, status in STATUS_OF.items() if status is not INTERNAL])
def test_every_error_of_the_service_has_its_class_back(kind: type[Exception]) -> None:
    status = STATUS_OF[kind]  # type: ignore[index]
    failure = Failure(status, "why", "field" if issubclass(kind, InvalidRequest) else None)
    over_http = of_http(httpx.Response(status.http, json=failure.body(), headers=failure.headers()))
    error = grpc.aio.AioRpcError(status.grpc, grpc.aio.Metadata(), grpc.aio.Metadata(), failure.details())
    over_grpc: Failed = of_grpc(error)
    assert type(over_http.error) is kind
    assert issubclass(kind, type(over_grpc.error))
    for failed in (over_http, over_grpc):
        assert str(failed.error) == "why"
        assert failed.retry_after_s == status.retry_after_s
        assert failed.again == (status.retry_after_s is not None)
    assert getattr(over_http.error, "param", None) == failure.param


def test_without_asyncio(make_service: MakeService, tokenizer: TextTokenizer) -> None:
    """A server in a loop of its own, and the client in this thread."""
    pieces: list[Piece] = []

    def ask(url: str) -> str:
        with Client(url, retry=NEVER) as client:
            pieces.extend(client.stream("Hi", max_tokens=8))
            for _ in client.stream("Hi", max_tokens=8):
                break
            with pytest.raises(ExpertNotFound):
                client.generate("Hi", model="nobody")
            assert client.models()[0] == "auto"
            reply = client.generate("Hi", max_tokens=8)
        with pytest.raises(RuntimeError, match="with"):
            client.generate("Hi")
        return reply.text

    async def both() -> str:
        methods = GrpcMethods()
        methods.service = make_service(says(tokenizer, "yes"))
        async with AsyncExitStack() as stack:
            return await asyncio.to_thread(ask, await serve(methods, stack))

    assert asyncio.run(both()) == "yes"
    assert "".join(piece.text for piece in pieces) == "yes"


def test_importing_it_is_light() -> None:
    code = (
        "import sys, meteora_dist.client; print(sorted({'torch', 'ray', 'transformers', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
