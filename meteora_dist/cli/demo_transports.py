"""How the demo asks: the service's four ways in, each giving the same kind of reply."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import httpx

from meteora_dist.cli.demo_questions import Question
from meteora_dist.errors import MeteoraError
from meteora_dist.serving.local import Endpoints
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.proto.meteora.v1.inference_pb2_grpc import InferenceStub

Json = dict[str, Any]

TIMEOUT_S = 240.0
"""Longest a request may take; far more than a loaded machine of two cores needs."""

_CHAT = "/v1/chat/completions"
_DATA = "data: "
_WHOLE_AT_ONCE = 2
"""A stream of this few tokens may come in one piece."""


class AskFailed(MeteoraError):
    """A request was refused, broke off, or its answer is not complete."""


@dataclass(frozen=True, slots=True)
class Token:
    """One produced token.

    Attributes:
        text: What it added to the answer; empty for special tokens.
        shares: Each expert's share of the gate weight, in the order of the bank.
    """

    text: str
    shares: tuple[float, ...]

    @property
    def dominating(self) -> int:
        """Index of the expert with the largest share."""
        return self.shares.index(max(self.shares))


@dataclass(frozen=True, slots=True)
class Reply:
    """One whole answer.

    Attributes:
        text: The answer.
        tokens: Its tokens.
        dominating: The expert with the largest share over all tokens; None when none acted.
    """

    text: str
    tokens: tuple[Token, ...]
    dominating: str | None


class Client:
    """Asks a service, over HTTP or gRPC as each question wants."""

    def __init__(self, http: httpx.AsyncClient, stub: InferenceStub) -> None:
        self._http = http
        self._stub = stub

    async def experts(self) -> tuple[str, ...]:
        """Names of the experts that are served, in the order of shares; raises AskFailed."""
        try:
            listed = await self._stub.ListExperts(pb.ListExpertsRequest(), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise AskFailed(f"grpc, ListExperts: {_grpc_reason(error)}") from error
        return tuple(expert.name for expert in listed.experts)

    async def ask(self, question: Question) -> Reply:
        """Sends a question its own way: mode ``auto``, greedy, with the routing trace.

        Raises:
            AskFailed: There is no complete answer with a complete trace; the message says why.
        """
        ways = {
            "http": self._ask_http,
            "http_stream": self._ask_http_stream,
            "grpc": self._ask_grpc,
            "grpc_stream": self._ask_grpc_stream,
        }
        try:
            return await ways[question.transport](question)
        except grpc.aio.AioRpcError as error:
            raise AskFailed(_grpc_reason(error)) from error
        except httpx.HTTPError as error:
            raise AskFailed(f"{type(error).__name__} {error}".strip()) from error
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise AskFailed(f"the answer has another shape than it must have: {error!r}") from error

    async def _ask_http(self, question: Question) -> Reply:
        response = await self._http.post(_CHAT, json=_body(question, stream=False))
        if response.status_code != httpx.codes.OK:
            raise AskFailed(_http_reason(response.status_code, response.content))
        return _from_json([response.json()], "message")

    async def _ask_http_stream(self, question: Question) -> Reply:
        async with self._http.stream("POST", _CHAT, json=_body(question, stream=True)) as response:
            if response.status_code != httpx.codes.OK:
                raise AskFailed(_http_reason(response.status_code, await response.aread()))
            events = [line.removeprefix(_DATA) async for line in response.aiter_lines() if line.startswith(_DATA)]
        chunks = read_events(events)
        # the last chunk carries the usage alone
        return _in_pieces(_from_json(chunks, "delta"), len(chunks) - 1)

    async def _ask_grpc(self, question: Question) -> Reply:
        return _from_messages([await self._stub.Generate(_message(question), timeout=TIMEOUT_S)])

    async def _ask_grpc_stream(self, question: Question) -> Reply:
        call = self._stub.GenerateStream(_message(question), timeout=TIMEOUT_S)
        messages = [message async for message in call]
        return _in_pieces(_from_messages(messages), len(messages))


@asynccontextmanager
async def connected(endpoints: Endpoints) -> AsyncIterator[Client]:
    """A client of the service at ``endpoints``; a proxy in the environment is not asked."""
    options = [("grpc.enable_http_proxy", 0)]
    async with (
        httpx.AsyncClient(base_url=endpoints.http, timeout=TIMEOUT_S, trust_env=False) as http,
        grpc.aio.insecure_channel(endpoints.grpc, options=options) as channel,
    ):
        yield Client(http, InferenceStub(channel))  # type: ignore[no-untyped-call]  # generated


def read_events(events: Sequence[str]) -> list[Json]:
    """The chunks in the data of server-sent events.

    Raises:
        AskFailed: One of them is an error, or the stream broke off before its end mark.
    """
    if not events or events[-1] != "[DONE]":
        chunk = json.loads(events[-1]) if events else {}
        reason = chunk["error"]["message"] if "error" in chunk else "it has no end mark"
        raise AskFailed(f"the stream broke off after {len(events)} events: {reason}")
    return [json.loads(event) for event in events[:-1]]


def _body(question: Question, stream: bool) -> Json:
    body: Json = {
        "model": "auto",
        "messages": [{"role": "user", "content": question.prompt}],
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "routing": {"trace": True},
        "stream": stream,
    }
    return body | ({"stream_options": {"include_usage": True}} if stream else {})


def _message(question: Question) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="auto",
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content=question.prompt)]),
        sampling=pb.Sampling(temperature=0),
        max_tokens=question.max_tokens,
        routing=pb.Routing(trace=True),
    )


def _from_json(parts: Sequence[Json], content: str) -> Reply:
    """The reply in one whole object, or in the chunks of a stream, of which the last carries the usage alone."""
    choices = [part["choices"][0] for part in parts if part["choices"]]
    tokens = [Token(token["token"], tuple(token["shares"])) for one in choices for token in one["routing"]["tokens"]]
    text = "".join(one[content]["content"] for one in choices)
    last = choices[-1]
    produced = parts[-1]["usage"]["completion_tokens"]
    return _complete(text, tokens, last["routing"]["dominating"], last["finish_reason"] is not None, produced)


def _from_messages(messages: Sequence[pb.GenerateResponse | pb.GenerateStreamResponse]) -> Reply:
    """The reply in one whole message, or in the messages of a stream."""
    tokens = [Token(token.token, tuple(token.shares)) for message in messages for token in message.routing.tokens]
    text = "".join(message.text for message in messages)
    last = messages[-1]
    finished = last.finish_reason != pb.FINISH_REASON_UNSPECIFIED
    return _complete(text, tokens, last.routing.dominating or None, finished, last.usage.completion_tokens)


def _complete(text: str, tokens: Sequence[Token], dominating: str | None, finished: bool, produced: int) -> Reply:
    if not finished:
        raise AskFailed("the answer has no end: its finish reason is missing")
    if not tokens or len(tokens) != produced:
        raise AskFailed(f"the routing trace has {len(tokens)} tokens, but {produced} were produced")
    return Reply(text, tuple(tokens), dominating)


def _in_pieces(reply: Reply, pieces: int) -> Reply:
    if pieces == 1 and len(reply.tokens) > _WHOLE_AT_ONCE:
        raise AskFailed(f"the stream brought all its {len(reply.tokens)} tokens in one piece")
    return reply


def _http_reason(status: int, body: bytes) -> str:
    try:
        error: Mapping[str, Any] = json.loads(body)["error"]
        return f"HTTP {status}: {error['message']}"
    except (KeyError, TypeError, ValueError):
        return f"HTTP {status}: {body[:200].decode(errors='replace')}"


def _grpc_reason(error: Any) -> str:
    return f"{error.code().name}: {error.details()}"
