"""An engine for the tests of what surrounds one: it produces the tokens it was given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from meteora_dist.engine.request import GenerationRequest, LayerExperts, Logprobs, TokenEvent
from meteora_dist.serving.tokenizer import TextTokenizer

EOS = 259


@dataclass
class ScriptedEngine:
    """Says ``tokens``, then ends the sequence; as many as the request allows.

    Attributes:
        tokens: What it says.
        error: Raised after the last token instead of ending.
        healthy: Error of ``check``; None when all is well.
        pause: When set, every token waits for it.
        votes: Of the layer routers, for requests that ask them.
        layers: Who dominates them, for requests that ask.
        seen: Requests it was asked.
        closed: Ids of requests whose generation was closed, for whatever reason.
    """

    tokens: list[int]
    error: Exception | None = None
    healthy: Exception | None = None
    pause: asyncio.Event | None = None
    votes: tuple[int, ...] = (1, 3, 1, 2)
    layers: LayerExperts = ((1, 0.75), (3, 0.5), (-1, 0.0))
    seen: list[GenerationRequest] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def using(self, generation: int) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self) -> None:
        if self.healthy is not None:
            raise self.healthy

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        self.seen.append(request)
        script = self.tokens if self.error else [*self.tokens, EOS]
        try:
            for index, token in enumerate(script[: request.max_tokens]):
                if self.pause is not None:
                    await self.pause.wait()
                last = index + 1 == request.max_tokens
                reason = "stop" if token == EOS else "length" if last else None
                shares = (0.1, 0.6, 0.2, 0.1) if request.trace or request.vote == "gates" else None
                top = None if request.top_logprobs is None else [(token, -0.5), (EOS, -1.0)][: request.top_logprobs]
                votes = self.votes if request.vote == "routers" else None
                logprobs = None if top is None else Logprobs(-0.5, tuple(top))
                layers = self.layers if request.trace_layers else None
                yield TokenEvent(token, reason, shares, logprobs, votes, layers)
            if self.error is not None:
                raise self.error
        finally:
            self.closed.append(request.request_id)


def says(tokenizer: TextTokenizer, text: str, **more: object) -> ScriptedEngine:
    """An engine that says ``text``."""
    return ScriptedEngine(list(tokenizer.encode(text)), **more)  # type: ignore[arg-type]
