"""From a text request to pieces of text, whatever protocol it came in by."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager
from dataclasses import dataclass, replace
from random import SystemRandom
from time import time
from typing import Protocol
from uuid import uuid4

from meteora_dist.engine.request import GenerationRequest, TokenEvent
from meteora_dist.errors import InvalidRequest, Overloaded, PromptTooLong
from meteora_dist.moe.routing import named
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.merge import merged
from meteora_dist.serving.ranges import check_ranges
from meteora_dist.serving.request import Piece, Prompt, TextRequest
from meteora_dist.serving.tokenizer import TextTokenizer
from meteora_dist.serving.transcript import Transcript

_SEED_STEP = 0x9E37_79B9_7F4A_7C15
"""Seeds of a prompt's answers lie so far apart that no draw of one is a draw of another."""


class Engine(Protocol):
    """What answers generation requests."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yields the request's tokens; closing the generator cancels it. Raises EngineUnavailable."""

    def using(self, generation: int) -> AbstractContextManager[None]:
        """Keeps a bank generation for requests for as long as the block runs."""

    def check(self) -> None:
        """Raises EngineUnavailable when it cannot answer."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A call that has passed every check.

    Attributes:
        id: Of the call, unique.
        asked: As it came.
        answers: What the engine is asked for, by the answers' indices, but for bank generation and routing: those are
            chosen when the call starts.
        created: When, in seconds of the Unix epoch.
    """

    id: str
    asked: TextRequest
    answers: tuple[GenerationRequest, ...]
    created: int


class TextService:
    """Checks, tokenizes, admits, generates, and turns tokens back into text.

    Attributes:
        catalog: The served models: those of the bank generation that calls start with, replaced when it is.
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
        """Checks and tokenizes a call.

        Raises:
            InvalidRequest: A field is out of range, or a prompt has no tokens.
            ExpertNotFound: Its model is not served.
            PromptTooLong: A prompt and its answer do not fit into the context.
        """
        check_ranges(request)
        self.catalog.routing(request.selection)
        # A long prompt must not hold up the streams of others.
        prompts = await asyncio.to_thread(lambda: [self._tokenizer.encode(prompt) for prompt in request.prompts])
        rooms = [self._room(request, prompt, len(ids)) for prompt, ids in zip(request.prompts, prompts, strict=True)]
        seed = SystemRandom().getrandbits(63) if request.seed is None else request.seed
        call = uuid4().hex
        answers = tuple(
            GenerationRequest(
                request_id=f"{call}-{number * request.n + answer}",
                prompt_ids=ids,
                max_tokens=room,
                sampling=replace(request.sampling, seed=(seed + answer * _SEED_STEP) % 2**63),
                trace=request.trace,
                ignore_eos=request.ignore_eos,
                top_logprobs=request.top_logprobs,
                grammar=request.grammar,
            )
            for number, (ids, room) in enumerate(zip(prompts, rooms, strict=True))
            for answer in range(request.n)
        )
        return Prepared(call, request, answers, int(time()))

    async def pieces(self, prepared: Prepared) -> AsyncGenerator[Piece, None]:
        """Generates all answers; the last piece of each has its ending. Closing the generator cancels them.

        They use, to their end, the bank generation that is the newest when the first piece is asked for.

        Raises:
            ExpertNotFound: An expert has left since the call was prepared; raised before the first piece.
            Overloaded: Too many requests are under way; raised before the first piece.
            EngineUnavailable: The engine is gone; may be raised between pieces.
        """
        catalog = self.catalog
        with self._admitted(len(prepared.answers)), self._engine.using(catalog.manifest.generation):
            answers = await self._decided(prepared, catalog)
            streams = [self._answer(prepared, catalog, index, answer) for index, answer in enumerate(answers)]
            async with aclosing(merged(streams)) as pieces:
                async for piece in pieces:
                    yield piece

    @contextmanager
    def _admitted(self, answers: int) -> Iterator[None]:
        if self._live + answers > self._max_live:
            raise Overloaded(
                f"{self._live} answers are under way, and this service takes at most {self._max_live}: try again"
            )
        self._live += answers
        try:
            yield
        finally:
            self._live -= answers

    async def _decided(self, prepared: Prepared, catalog: Catalog) -> list[GenerationRequest]:
        """The answers' requests; under ``auto-sequence`` with the expert that each prompt has voted for."""
        routing, generation = catalog.routing(prepared.asked.selection), catalog.manifest.generation
        answers = [replace(answer, routing=routing, generation=generation) for answer in prepared.answers]
        if prepared.asked.selection.mode != "auto-sequence":
            return answers
        n = prepared.asked.n
        experts = await asyncio.gather(*(self._vote(answer) for answer in answers[::n]))
        return [replace(answer, routing=named(experts[index // n])) for index, answer in enumerate(answers)]

    async def _vote(self, answer: GenerationRequest) -> int:
        """The expert with the most gate weight over the prompt, all its tokens and all routed linears together."""
        ballot = GenerationRequest(
            f"{answer.request_id}-vote",
            answer.prompt_ids,
            max_tokens=1,
            routing=answer.routing,
            generation=answer.generation,
            vote=True,
        )
        shares: tuple[float, ...] = ()
        async with aclosing(self._engine.generate(ballot)) as events:
            async for event in events:
                shares = event.shares or ()
        assert shares, "a vote ends with its shares"
        return shares.index(max(shares))

    async def _answer(
        self, prepared: Prepared, catalog: Catalog, index: int, request: GenerationRequest
    ) -> AsyncGenerator[Piece, None]:
        transcript = Transcript(request, self._tokenizer, prepared.asked.stop, catalog.experts, index)
        async with aclosing(self._engine.generate(request)) as events:
            async for event in events:
                piece = transcript.push(event)
                yield piece
                if piece.ending is not None:
                    return

    def _room(self, request: TextRequest, prompt: Prompt, prompt_tokens: int) -> int:
        param = "messages" if isinstance(prompt, tuple) else "prompt"
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
