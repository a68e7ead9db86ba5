"""Callers of a service under test: streams over HTTP and gRPC that note every token and when it came."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
import httpx

from meteora_dist.serving.local import Endpoints
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.proto.meteora.v1.inference_pb2_grpc import InferenceStub

TIMEOUT_S = 500.0
"""Longest a stream may take, pauses included."""
_DATA = "data: "


@dataclass(frozen=True, slots=True)
class Question:
    """What one caller asks, always in the same way.

    Attributes:
        transport: ``http`` or ``grpc``.
        model: ``auto``, ``base`` or an expert.
        prompt: Text to continue, greedily.
        tokens: Most tokens to produce.
    """

    transport: str
    model: str
    prompt: str
    tokens: int


@dataclass(slots=True)
class Stream:
    """One answer as it came in.

    Attributes:
        tokens: Ids of its tokens.
        times: When each came, and first of all when it was asked for; seconds of ``time.monotonic``.
        text: Its text.
        ending: Why it ended, as the service put it, and its token counts.
        failure: Why it failed; None for a whole answer.
    """

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=lambda: [time.monotonic()])
    text: str = ""
    ending: tuple[str, int, int] | None = None
    failure: str | None = None

    def add(self, tokens: list[int], text: str) -> None:
        """Notes what has just come."""
        self.tokens += tokens
        self.times += [time.monotonic()] * len(tokens)
        self.text += text

    def has_token_after(self, moment: float) -> bool:
        """Whether a token came after ``moment``."""
        return len(self.times) > 1 and self.times[-1] >= moment

    def pause_s(self, start: float, end: float) -> float:
        """Longest time without a token within ``start`` to ``end``."""
        gaps = zip(self.times, self.times[1:], strict=False)
        return max([0.0, *(min(late, end) - max(early, start) for early, late in gaps)])


class Callers:
    """Asks a service."""

    def __init__(self, http: httpx.AsyncClient, stub: InferenceStub) -> None:
        self._http = http
        self._stub = stub

    async def ask(self, question: Question, stream: Stream) -> None:
        """Sends a question and fills ``stream``; a failure is noted there, too."""
        try:
            await (self._http_stream if question.transport == "http" else self._grpc_stream)(question, stream)
            if stream.ending is None:
                stream.failure = "it ended without an ending"
        except grpc.aio.AioRpcError as error:
            stream.failure = f"{error.code().name}: {error.details()}"
        except httpx.HTTPError as error:
            stream.failure = f"{type(error).__name__}: {error}"
        except (KeyError, IndexError, ValueError) as error:
            stream.failure = f"not an answer: {error!r}"

    async def models(self) -> list[str]:
        """Every name a question may use."""
        listed = (await self._http.get("/v1/models")).raise_for_status().json()
        return [model["id"] for model in listed["data"]]

    async def _http_stream(self, question: Question, stream: Stream) -> None:
        body = {
            "model": question.model,
            "prompt": question.prompt,
            "max_tokens": question.tokens,
            "temperature": 0,
            "routing": {"trace": True},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        reason = ""
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != httpx.codes.OK:
                raise ValueError(f"HTTP {response.status_code}: {(await response.aread()).decode(errors='replace')}")
            async for line in response.aiter_lines():
                if not line or line == f"{_DATA}[DONE]":
                    continue
                chunk = json.loads(line.removeprefix(_DATA))
                for choice in chunk["choices"]:
                    stream.add([token["id"] for token in choice["routing"]["tokens"]], choice["text"])
                    reason = choice["finish_reason"] or reason
                if usage := chunk["usage"]:
                    stream.ending = (reason, usage["prompt_tokens"], usage["completion_tokens"])

    async def _grpc_stream(self, question: Question, stream: Stream) -> None:
        request = pb.GenerateRequest(
            prompt=question.prompt,
            model=question.model,
            max_tokens=question.tokens,
            sampling=pb.Sampling(temperature=0),
            routing=pb.Routing(trace=True),
        )
        async for message in self._stub.GenerateStream(request, timeout=TIMEOUT_S):
            choice = message.choice
            stream.add([token.id for token in choice.routing.tokens], choice.text)
            if choice.finish_reason:
                reason = pb.FinishReason.Name(choice.finish_reason).removeprefix("FINISH_REASON_").lower()
                stream.ending = (reason, message.usage.prompt_tokens, message.usage.completion_tokens)


@asynccontextmanager
async def connected(endpoints: Endpoints) -> AsyncIterator[Callers]:
    """Callers of the service at ``endpoints``; a proxy in the environment is not asked."""
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=endpoints.http, timeout=TIMEOUT_S, limits=limits, trust_env=False) as http,
        grpc.aio.insecure_channel(endpoints.grpc, options=[("grpc.enable_http_proxy", 0)]) as channel,
    ):
        yield Callers(http, InferenceStub(channel))  # type: ignore[no-untyped-call]  # generated
