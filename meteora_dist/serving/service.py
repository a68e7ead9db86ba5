"""From a text request to pieces of text, whatever protocol it came in by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from random import SystemRandom
from time import time
from typing import Protocol
from uuid import uuid4

from meteora_dist.engine.request import GenerationRequest, Sampling, TokenEvent
from meteora_dist.errors import InvalidRequest, Overloaded, PromptTooLong
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.request import Piece, TextRequest
from meteora_dist.serving.tokenizer import TextTokenizer
from meteora_dist.serving.transcript import Transcript


class Engine(Protocol):
    """What answers generation requests."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yields the request's tokens; closing the generator cancels it. Raises EngineUnavailable."""

    def check(self) -> None:
        """Raises EngineUnavailable when it cannot answer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that has passed every check.

    Attributes:
        asked: As it came.
        generation: As the engine gets it.
        created: When, in seconds of the Unix epoch.
    """

    asked: TextRequest
    generation: GenerationRequest
    created: int

    @property
    def id(self) -> str:
        """Of the request, unique."""
        return self.generation.request_id


class TextService:
    """Checks, tokenizes, admits, generates, and turns tokens back into text.

    Attributes:
        catalog: The served models.
    """

    def __init__(
        self, engine: Engine, tokenizer: TextTokenizer, catalog: Catalog, max_model_len: int, max_live_requests: int
    ) -> None:
        self.catalog = catalog
        self._engine = engine
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len
        self._max_live = max_live_requests
        self._live = 0

    def check(self) -> None:
        """Raises EngineUnavailable when no request can be answered."""
        self._engine.check()

    async def prepare(self, request: TextRequest) -> Prepared:
        """Checks and tokenizes a request.

        Raises:
            InvalidRequest: A field is out of range, or the prompt has no tokens.
            ExpertNotFound: Its model is not served.
            PromptTooLong: Prompt and answer do not fit into the context.
        """
        request.check()
        routing = self.catalog.routing(request)
        # A long prompt must not hold up the streams of others.
        prompt_ids = await asyncio.to_thread(self._tokenizer.encode, request.prompt)
        seed = SystemRandom().getrandbits(63) if request.seed is None else request.seed % 2**63
        generation = GenerationRequest(
            request_id=uuid4().hex,
            prompt_ids=prompt_ids,
            max_tokens=self._room(request, len(prompt_ids)),
            sampling=Sampling(request.temperature, request.top_p, seed),
            routing=routing,
            trace=request.trace,
        )
        return Prepared(request, generation, int(time()))

    async def pieces(self, prepared: Prepared) -> AsyncGenerator[Piece, None]:
        """Generates; the last piece has the ending. Closing the generator cancels the request.

        Raises:
            Overloaded: Too many requests are under way; raised before the first piece.
            EngineUnavailable: The engine is gone; may be raised between pieces.
        """
        if self._live >= self._max_live:
            raise Overloaded(f"{self._live} requests are under way, which is the most this service takes: try again")
        self._live += 1
        try:
            detokenizer = self._tokenizer.detokenizer(prepared.generation.prompt_ids)
            transcript = Transcript(prepared.generation, detokenizer, prepared.asked.stop, self.catalog.experts)
            async with aclosing(self._engine.generate(prepared.generation)) as events:
                async for event in events:
                    piece = transcript.push(event)
                    yield piece
                    if piece.ending is not None:
                        return
        finally:
            self._live -= 1

    def _room(self, request: TextRequest, prompt_tokens: int) -> int:
        param = "prompt" if isinstance(request.prompt, str) else "messages"
        if prompt_tokens == 0:
            raise InvalidRequest(f"{param} has no tokens: there is nothing to continue", param)
        wanted = 1 if request.max_tokens is None else request.max_tokens
        if prompt_tokens + wanted > self._max_model_len:
            raise PromptTooLong(
                f"the context holds {self._max_model_len} tokens, but this request needs {prompt_tokens + wanted}: "
                f"{prompt_tokens} of the prompt and {wanted} of the answer",
                param,
            )
        return self._max_model_len - prompt_tokens if request.max_tokens is None else request.max_tokens
