"""From a text request to pieces of text, whatever protocol it came in by."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from random import SystemRandom
from time import time
from typing import Protocol, TypeVar
from uuid import uuid4

from meteora_dist.engine.request import GenerationRequest, TokenEvent
from meteora_dist.errors import EngineUnavailable, InvalidRequest, PromptTooLong, RequestExpired
from meteora_dist.moe.routing import NO_EXPERT
from meteora_dist.observability.calls import Call, Observer, current_call
from meteora_dist.serving.admission import Admission
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.json_grammar import GrammarCheck
from meteora_dist.serving.keys import Caller
from meteora_dist.serving.limits import Limits
from meteora_dist.serving.merge import merged
from meteora_dist.serving.ranges import check_ranges
from meteora_dist.serving.request import Piece, Prompt, TextRequest
from meteora_dist.serving.tokenizer import TextTokenizer
from meteora_dist.serving.transcript import Transcript
from meteora_dist.serving.voting import Decided, ballot, decided

_SEED_STEP = 0x9E37_79B9_7F4A_7C15
"""Seeds of a prompt's answers lie so far apart that no draw of one is a draw of another."""

Step = TypeVar("Step")


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
        caller: Whose it is.
        answers: What the engine is asked for, by the answers' indices, but for bank generation and routing: those are
            chosen when the call starts.
        call: What is seen of it.
        created: When, in seconds of the Unix epoch.
        expires: When it must have ended, in seconds of the event loop's clock.
    """

    id: str
    asked: TextRequest
    caller: Caller
    answers: tuple[GenerationRequest, ...]
    call: Call
    created: int
    expires: float

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the engine reads for all answers."""
        return sum(len(answer.prompt_ids) for answer in self.answers)

    @property
    def cost(self) -> int:
        """Most tokens that all answers may come to, prompts included."""
        return self.prompt_tokens + sum(answer.max_tokens for answer in self.answers)


class TextService:
    """Checks, tokenizes, admits, generates, and turns tokens back into text.

    Attributes:
        catalog: The served models: those of the bank generation that calls start with, replaced when it is.
        limits: What a request may ask for.
        gate: What calls pass before they come here.
        admission: Where they wait for the engine.
        missing: The newest bank generation, while it could not be loaded here; calls then use the one before.
        requests: How many calls have chosen each expert by name or in a blend.
        observer: Watches them.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: TextTokenizer,
        catalog: Catalog,
        limits: Limits,
        gate: Gate,
        observer: Observer | None = None,
    ) -> None:
        self.catalog = catalog
        self.missing: int | None = None
        self.observer = observer or Observer()
        self.limits = limits
        self.gate = gate
        self.admission = Admission(limits.max_live_requests, limits.max_waiting_requests)
        self.requests: Counter[str] = Counter()
        self._engine = engine
        self._tokenizer = tokenizer
        self._grammars = GrammarCheck()

    def check(self) -> None:
        """Raises EngineUnavailable when no request can be answered, or not as other replicas answer it."""
        self.gate.check()
        self._engine.check()
        if self.missing is not None:
            raise EngineUnavailable(
                f"this replica could not load generation {self.missing} of the bank, and tries again: ask another one"
            )

    async def prepare(self, request: TextRequest, caller: Caller) -> Prepared:
        """Checks and tokenizes a call.

        Raises:
            InvalidRequest: A field is out of range, a prompt has no tokens, or the grammar cannot be used.
            Forbidden: The caller may not use its model.
            ExpertNotFound: Its model is not served.
            Overloaded: Too many calls wait already.
            PromptTooLong: A prompt and its answer do not fit into the context.
        """
        check_ranges(request)
        self.limits.check(request)
        self.catalog.check_selection(request.selection, caller)
        call = current_call()
        call.asks(request.model, request.selection.mode)
        # Tokenizing a long prompt is work as well: not for a call that would be refused after it.
        self.admission.check(caller.name, len(request.prompts) * request.n)
        expires = asyncio.get_running_loop().time() + self.limits.max_request_s
        # A long prompt must not hold up the streams of others.
        prompts = await asyncio.to_thread(lambda: [self._tokenizer.encode(prompt) for prompt in request.prompts])
        rooms = [self._room(request, prompt, len(ids)) for prompt, ids in zip(request.prompts, prompts, strict=True)]
        if request.grammar is not None:
            await self._grammars.check(request.grammar)
        seed = SystemRandom().getrandbits(63) if request.seed is None else request.seed
        call.completion_id = uuid4().hex
        call.reads(sum(map(len, prompts)))
        answers = tuple(
            GenerationRequest(
                request_id=f"{call.completion_id}-{number * request.n + answer}",
                prompt_ids=ids,
                max_tokens=room,
                sampling=replace(request.sampling, seed=(seed + answer * _SEED_STEP) % 2**63),
                trace=request.trace or call.traced,
                trace_layers=request.trace_layers,
                ignore_eos=request.ignore_eos,
                top_logprobs=request.top_logprobs,
                grammar=request.grammar,
            )
            for number, (ids, room) in enumerate(zip(prompts, rooms, strict=True))
            for answer in range(request.n)
        )
        return Prepared(call.completion_id, request, caller, answers, call, int(time()), expires)

    async def pieces(self, prepared: Prepared) -> AsyncGenerator[Piece, None]:
        """Generates all answers; the last piece of each has its ending. Closing the generator cancels them.

        They use, to their end, the bank generation that is the newest when the first piece is asked for.

        Raises:
            ExpertNotFound: An expert has left since the call was prepared; raised before the first piece.
            Overloaded: Too many calls wait already; raised before the first piece.
            RequestExpired: It has taken too long.
            EngineUnavailable: The engine is gone; may be raised between pieces.
        """
        place = self.admission.admitted(prepared.caller.name, prepared.cost, len(prepared.answers))
        async with AsyncExitStack() as stack:
            ticket = await self._in_time(prepared, stack.enter_async_context(place))
            prepared.call.admitted()
            ticket.spent = prepared.prompt_tokens
            catalog = self.catalog
            stack.enter_context(self._engine.using(catalog.manifest.generation))
            answers = await self._in_time(prepared, self._decided(prepared, catalog))
            self.requests.update(name for name, _ in prepared.asked.selection.experts)
            streams = [self._answer(prepared, catalog, index, answer) for index, answer in enumerate(answers)]
            async for piece in await stack.enter_async_context(aclosing(merged(streams))):
                ticket.spent += 1
                yield piece

    async def _in_time(self, prepared: Prepared, step: Awaitable[Step]) -> Step:
        """One step of a call; raises RequestExpired when its time is over before the step is."""
        try:
            # Step by step: what asks for the pieces may go on in another task than it began in.
            async with asyncio.timeout_at(prepared.expires) as limit:
                return await step
        except TimeoutError:
            if not limit.expired():
                raise
            raise RequestExpired(
                f"this request was not done within {self.limits.max_request_s:g} s, which is the most this service "
                "gives one"
            ) from None

    async def _decided(self, prepared: Prepared, catalog: Catalog) -> list[Decided]:
        """The answers' requests; under ``auto-sequence`` with the expert that each prompt has voted for."""
        # An expert may have left while the call waited.
        catalog.check_selection(prepared.asked.selection, prepared.caller)
        routing, generation = catalog.routing(prepared.asked.selection), catalog.manifest.generation
        answers = [replace(answer, routing=routing, generation=generation) for answer in prepared.answers]
        if prepared.asked.selection.mode != "auto-sequence":
            return [Decided(answer) for answer in answers]
        n, rule = prepared.asked.n, prepared.asked.selection.vote or catalog.manifest.routing.vote
        routers, experts = catalog.manifest.routers is not None, len(catalog.experts)
        outcomes = await asyncio.gather(*(self._outcome(ballot(answer, routers)) for answer in answers[::n]))
        return [decided(answer, outcomes[index // n], experts, rule) for index, answer in enumerate(answers)]

    async def _outcome(self, vote: GenerationRequest) -> TokenEvent:
        """The one token of a vote."""
        async with aclosing(self._engine.generate(vote)) as events:
            (outcome,) = [event async for event in events]
        return outcome

    async def _answer(
        self, prepared: Prepared, catalog: Catalog, index: int, decided: Decided
    ) -> AsyncGenerator[Piece, None]:
        seen = [number for number, expert in enumerate(catalog.experts) if prepared.caller.sees(expert)]
        names = tuple(catalog.experts[number] for number in seen)
        votes = tuple(decided.votes[number] for number in seen) if decided.votes and prepared.asked.trace else ()
        transcript = Transcript(decided.request, self._tokenizer, prepared.asked.stop, names, index, votes)
        watch = prepared.call.answer(catalog.experts)
        async with aclosing(self._engine.generate(decided.request)) as events:
            while True:
                event = await self._in_time(prepared, anext(events))
                watch.token(event.shares)
                # Shares may be there for the call's span alone.
                piece = transcript.push(_shown(event, seen) if prepared.asked.trace else replace(event, shares=None))
                yield piece
                if piece.ending is not None:
                    return

    def _room(self, request: TextRequest, prompt: Prompt, prompt_tokens: int) -> int:
        param = "messages" if isinstance(prompt, tuple) else "prompt"
        if prompt_tokens == 0:
            raise InvalidRequest(f"{param} has no tokens: there is nothing to continue", param)
        most, context = self.limits.max_prompt_tokens, self.limits.max_model_len
        if most is not None and prompt_tokens > most:
            raise PromptTooLong(f"{param} has {prompt_tokens} tokens, but may have {most} at most", param)
        wanted = 1 if request.max_tokens is None else request.max_tokens
        if prompt_tokens + wanted > context:
            raise PromptTooLong(
                f"the context holds {context} tokens, but this request needs {prompt_tokens + wanted}: "
                f"{prompt_tokens} of the prompt and {wanted} of the answer",
                param,
            )
        if request.max_tokens is not None:
            return request.max_tokens
        return min(context - prompt_tokens, self.limits.max_answer_tokens or context)


def _shown(event: TokenEvent, experts: Sequence[int]) -> TokenEvent:
    """The event with the shares of these experts alone, numbered by their places here."""
    if event.shares is None or len(experts) == len(event.shares):
        return event
    layers = event.layers
    if layers is not None:
        places = {expert: place for place, expert in enumerate(experts)}
        layers = tuple((places[expert], share) if expert in places else (NO_EXPERT, 0.0) for expert, share in layers)
    return replace(event, shares=tuple(event.shares[expert] for expert in experts), layers=layers)
