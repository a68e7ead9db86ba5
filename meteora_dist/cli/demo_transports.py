"""How the demo asks: the service's four ways in, each giving the same kind of reply."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import httpx

from meteora_dist.cli.demo_questions import Question
from meteora_dist.cli.demo_replies import AskFailed, Json, Reply, from_json, from_messages, in_pieces, read_events
from meteora_dist.serving.local import Endpoints
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.proto.meteora.v1.inference_pb2_grpc import InferenceStub
from meteora_dist.serving.request import Turn

TIMEOUT_S = 240.0
"""Longest a request may take; far more than a loaded machine of two cores needs."""

_CHAT = "/v1/chat/completions"
_DATA = "data: "


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

    async def ask(self, question: Question) -> tuple[Reply, ...]:
        """Sends a question its own way: mode ``auto``, greedy, with the routing trace.

        Returns:
            The answer to each of the question's turns, which has the turns and answers before it as its context.

        Raises:
            AskFailed: An answer or its trace is not complete; the message says why.
        """
        ways = {
            "http": self._ask_http,
            "http_stream": self._ask_http_stream,
            "grpc": self._ask_grpc,
            "grpc_stream": self._ask_grpc_stream,
        }
        said: list[Turn] = []
        replies = []
        try:
            for turn in question.turns:
                said.append(Turn("user", turn))
                replies.append(await ways[question.transport](said, question.max_tokens))
                said.append(Turn("assistant", replies[-1].text))
        except grpc.aio.AioRpcError as error:
            raise AskFailed(_grpc_reason(error)) from error
        except httpx.HTTPError as error:
            raise AskFailed(f"{type(error).__name__} {error}".strip()) from error
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise AskFailed(f"the answer has another shape than it must have: {error!r}") from error
        return tuple(replies)

    async def _ask_http(self, turns: Sequence[Turn], max_tokens: int) -> Reply:
        response = await self._http.post(_CHAT, json=_body(turns, max_tokens, stream=False))
        if response.status_code != httpx.codes.OK:
            raise AskFailed(_http_reason(response.status_code, response.content))
        return from_json([response.json()], "message")

    async def _ask_http_stream(self, turns: Sequence[Turn], max_tokens: int) -> Reply:
        async with self._http.stream("POST", _CHAT, json=_body(turns, max_tokens, stream=True)) as response:
            if response.status_code != httpx.codes.OK:
                raise AskFailed(_http_reason(response.status_code, await response.aread()))
            events = [line.removeprefix(_DATA) async for line in response.aiter_lines() if line.startswith(_DATA)]
        chunks = read_events(events)
        # the last chunk carries the usage alone
        return in_pieces(from_json(chunks, "delta"), len(chunks) - 1)

    async def _ask_grpc(self, turns: Sequence[Turn], max_tokens: int) -> Reply:
        return from_messages([await self._stub.Generate(_message(turns, max_tokens), timeout=TIMEOUT_S)])

    async def _ask_grpc_stream(self, turns: Sequence[Turn], max_tokens: int) -> Reply:
        call = self._stub.GenerateStream(_message(turns, max_tokens), timeout=TIMEOUT_S)
        messages = [message async for message in call]
        return in_pieces(from_messages(messages), len(messages))


@asynccontextmanager
async def connected(endpoints: Endpoints) -> AsyncIterator[Client]:
    """A client of the service at ``endpoints``; a proxy in the environment is not asked."""
    options = [("grpc.enable_http_proxy", 0)]
    async with (
        httpx.AsyncClient(base_url=endpoints.http, timeout=TIMEOUT_S, trust_env=False) as http,
        grpc.aio.insecure_channel(endpoints.grpc, options=options) as channel,
    ):
        yield Client(http, InferenceStub(channel))  # type: ignore[no-untyped-call]  # generated


def _body(turns: Sequence[Turn], max_tokens: int, stream: bool) -> Json:
    body: Json = {
        "model": "auto",
        "messages": [{"role": turn.role, "content": turn.content} for turn in turns],
        "max_tokens": max_tokens,
        "temperature": 0,
        "routing": {"trace": True},
        "stream": stream,
    }
    return body | ({"stream_options": {"include_usage": True}} if stream else {})


def _message(turns: Sequence[Turn], max_tokens: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        model="auto",
        chat=pb.Chat(messages=[pb.ChatMessage(role=turn.role, content=turn.content) for turn in turns]),
        sampling=pb.Sampling(temperature=0),
        max_tokens=max_tokens,
        routing=pb.Routing(trace=True),
    )


def _http_reason(status: int, body: bytes) -> str:
    try:
        error: Mapping[str, Any] = json.loads(body)["error"]
        return f"HTTP {status}: {error['message']}"
    except (KeyError, TypeError, ValueError):
        return f"HTTP {status}: {body[:200].decode(errors='replace')}"


def _grpc_reason(error: Any) -> str:
    return f"{error.code().name}: {error.details()}"
