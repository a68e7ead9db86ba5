"""The bodies of the OpenAI endpoints as they are accepted: every field typed, every unknown one refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.config import JsonDict

from meteora_dist.engine.request import Sampling
from meteora_dist.errors import InvalidRequest
from meteora_dist.serving import ranges
from meteora_dist.serving.json_grammar import json_grammar
from meteora_dist.serving.request import Prompt, TextRequest, TokenIds, Turn
from meteora_dist.serving.selection import (
    MAX_BLEND,
    MAX_TEMPERATURE,
    MAX_WEIGHT,
    MIN_TEMPERATURE,
    MODES,
    VOTE_RULES,
    select,
)

COMPLETION_MAX_TOKENS = 16
"""What OpenAI's completions endpoint produces when ``max_tokens`` is absent."""

_UNION_PARTS = frozenset({"str", "list[str]", "list[int]", "list[list[int]]", "list[TextPart]"})
"""What pydantic adds to a field's path for the alternative it tried."""

_MAX_DIGITS = 10
"""Of a token id."""

Body = TypeVar("Body", bound=BaseModel)


def _documented(**schema: object) -> Any:
    """An optional field with a range that the OpenAPI document shows; ``check_ranges`` and ``select`` enforce it."""
    return Field(default=None, json_schema_extra=cast(JsonDict, schema))


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """How a stream is sent.

    Attributes:
        include_usage: Whether a last chunk carries the usage.
    """

    include_usage: bool | None = None


class ChosenExpert(_Strict):
    """An expert of ``routing.experts``.

    Attributes:
        name: Its name; 404 when it is not served, 403 when the key may not use it.
        weight: Its part in a blend; None for 1. Refused for mode ``named``.
    """

    name: str
    weight: float | None = _documented(minimum=-MAX_WEIGHT, maximum=MAX_WEIGHT)


class RoutingOptions(_Strict):
    """Our extension: which experts act. It may say what ``model`` says as well, and more.

    Attributes:
        mode: How experts are chosen; None for what ``model`` says. Refused when both say different things.
        experts: The one of ``named``, the ones of ``blend``, each once; refused for other modes.
        top_k: Experts a token uses under ``auto``; None for the bank's default. Refused for other modes.
        temperature: Divides the gate logits of the chosen experts before the softmax under ``auto``; None for the
            bank's default. Refused for other modes.
        vote: How routers decide under ``auto-sequence``: ``majority`` or ``last``; None for the bank's default.
            Refused for other modes, and by a bank without routers.
        trace: Whether every choice reports each expert's share for every token, and the votes of routers;
            ``layers`` for the dominating expert of each decoder layer as well.
    """

    mode: str | None = _documented(enum=[*MODES, None])
    experts: list[ChosenExpert] | None = _documented(maxItems=MAX_BLEND)
    top_k: int | None = _documented(minimum=1)
    temperature: float | None = _documented(minimum=MIN_TEMPERATURE, maximum=MAX_TEMPERATURE)
    vote: str | None = _documented(enum=[*VOTE_RULES, None])
    trace: bool | Literal["layers"] = False


class JsonSchema(_Strict):
    """The schema of ``response_format``.

    Attributes:
        name: For people.
        description: For people.
        schema_: The JSON schema; None takes any object.
        strict: Answers always follow the schema here, whatever it says.
    """

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """What answers look like.

    Attributes:
        type: ``text``, ``json_object`` for any JSON object, or ``json_schema``.
        json_schema: With the last of these.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> str | None:
        """What answers must match; raises InvalidRequest."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequest("response_format.json_schema goes with type json_schema", "response_format")
        if self.type == "text":
            return None
        return json_grammar(None if self.json_schema is None else self.json_schema.schema_)


class GenerationBody(_Strict):
    """What both endpoints take; ranges are checked where both protocols meet, in ``check_ranges``.

    Attributes:
        model: ``auto``: the gates pick experts for every token. ``auto-sequence``: a vote on the prompt picks one
            expert for the whole answer. The name of an expert. A blend, ``NAME:WEIGHT,NAME:WEIGHT``. ``base``: no
            expert. ``routing`` can say the same in fields of its own.
        max_tokens: Most tokens to produce for an answer; None for 16 (completions) or what the context has room for
            (chat). ``context_length_exceeded`` when prompt and answer do not fit.
        temperature: 0 takes the most probable token (greedy), 2 flattens the distribution; None for 1.
        top_p: Draws only from the most probable tokens that together reach this probability; None for 1.
        top_k: Draws only from this many most probable tokens; 0 or None for all.
        min_p: Draws only from tokens with at least this part of the largest probability; None for 0.
        presence_penalty: Taken off the logits of tokens that the answer has already; None for 0.
        frequency_penalty: Taken off for every time the answer has them; None for 0.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that prompt or answer have; None
            for 1.
        logit_bias: Added to logits by token id, -100 to 100 each.
        stop: Texts that end the answer where they appear, and are not part of it; by default four of 256 characters
            at most (``max_stops``, ``max_stop_chars``).
        seed: The same seed and request give the same answer, in any batch; None for a random one.
        n: Answers to each prompt; they differ by their seeds. A call has at most 32 answers. None for 1.
        ignore_eos: Whether to go on after the end-of-sequence token; not with a ``response_format``.
        response_format: What answers must look like; None for anything.
        stream: Whether to answer with server-sent events, one a piece of text.
        stream_options: How a stream is sent; refused without ``stream``.
        user: Taken, and used for nothing.
        routing: Which experts act, and whether to report it.
    """

    model: str = "auto"
    max_tokens: int | None = _documented(minimum=1)
    temperature: float | None = _documented(minimum=0, maximum=ranges.MAX_TEMPERATURE)
    top_p: float | None = _documented(exclusiveMinimum=0, maximum=1)
    top_k: int | None = _documented(minimum=0, maximum=ranges.MAX_INTEGER)
    min_p: float | None = _documented(minimum=0, maximum=1)
    presence_penalty: float | None = _documented(minimum=-ranges.MAX_PENALTY, maximum=ranges.MAX_PENALTY)
    frequency_penalty: float | None = _documented(minimum=-ranges.MAX_PENALTY, maximum=ranges.MAX_PENALTY)
    repetition_penalty: float | None = _documented(minimum=ranges.MIN_REPETITION, maximum=ranges.MAX_REPETITION)
    logit_bias: dict[str, float] | None = _documented(
        propertyNames={"pattern": f"^[0-9]{{1,{_MAX_DIGITS}}}$"}, maxProperties=ranges.MAX_BIASES
    )
    stop: str | list[str] | None = _documented(minLength=1)
    seed: int | None = _documented(minimum=ranges.MIN_SEED, maximum=ranges.MAX_SEED)
    n: int | None = _documented(minimum=1, maximum=ranges.MAX_ANSWERS)
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    routing: RoutingOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def text_request(
        self, prompts: tuple[Prompt, ...], max_tokens: int | None, top_logprobs: int | None
    ) -> TextRequest:
        """The protocol-independent request.

        Raises:
            InvalidRequest: ``stream_options`` came without ``stream``, or fields contradict each other.
        """
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true", "stream_options")
        routing = self.routing or RoutingOptions()
        experts = [(expert.name, expert.weight) for expert in routing.experts or ()]
        return TextRequest(
            prompts=prompts,
            model=self.model,
            selection=select(self.model, routing.mode, experts, routing.top_k, routing.temperature, routing.vote),
            n=1 if self.n is None else self.n,
            max_tokens=max_tokens,
            sampling=self._sampling(),
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            ignore_eos=bool(self.ignore_eos),
            top_logprobs=top_logprobs,
            grammar=None if self.response_format is None else self.response_format.grammar(),
            trace=bool(routing.trace),
            trace_layers=routing.trace == "layers",
        )

    def _sampling(self) -> Sampling:
        given = {
            name: value
            for name in ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature=temperature, logit_bias=_biases(self.logit_bias or {}), **given)


class CompletionBody(GenerationBody):
    """The body of ``POST /v1/completions``.

    Attributes:
        prompt: The text to continue, or the token ids; a list of either is answered in one call.
        logprobs: How many of the most probable tokens to report for every token, beside itself.
    """

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = _documented(minimum=0, maximum=ranges.MAX_TOP_LOGPROBS)

    def to_request(self) -> TextRequest:
        """The protocol-independent request; raises InvalidRequest."""
        limit = COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return self.text_request(_prompts(self.prompt), limit, self.logprobs)


class TextPart(_Strict):
    """A part of a message's content.

    Attributes:
        type: There is one kind.
        text: Joined to the other parts' without anything between.
    """

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation.

    Attributes:
        role: Who speaks; ``developer`` is another word for ``system``.
        content: What is said.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def to_turn(self) -> Turn:
        """With the parts of its content joined."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return Turn("system" if self.role == "developer" else self.role, text)


class ChatBody(GenerationBody):
    """The body of ``POST /v1/chat/completions``.

    Attributes:
        messages: The conversation, put into the model's own chat template; the answer is the assistant's next turn.
        max_completion_tokens: The newer name of ``max_tokens``; one of them at most.
        logprobs: Whether to report how probable every token was.
        top_logprobs: How many of the most probable tokens to report beside it; refused without ``logprobs``.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = _documented(minimum=1)
    logprobs: bool | None = None
    top_logprobs: int | None = _documented(minimum=0, maximum=ranges.MAX_TOP_LOGPROBS)

    def to_request(self) -> TextRequest:
        """The protocol-independent request; raises InvalidRequest."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest("max_tokens and max_completion_tokens exclude each other", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs is only allowed when logprobs is true", "top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        top = (self.top_logprobs or 0) if self.logprobs else None
        return self.text_request((tuple(message.to_turn() for message in self.messages),), limit, top)


def parse(body: type[Body], raw: bytes) -> Body:
    """Reads a request's body.

    Raises:
        InvalidRequest: It is not JSON, or a field is missing, unknown or of another type; names the first such field.
    """
    try:
        return body.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        raise InvalidRequest(f"the body is not valid JSON: {first['ctx']['error']}")
    param = ".".join(str(part) for part in first["loc"] if part not in _UNION_PARTS) or None
    if first["type"] == "extra_forbidden":
        raise InvalidRequest(f"{param} is not a field this service knows", param)
    if first["loc"][:1] == ("prompt",) and first["type"] != "missing":
        raise InvalidRequest("prompt must be a text, a list of texts, a list of token ids or a list of these", "prompt")
    if first["loc"][:2] == ("routing", "trace"):
        raise InvalidRequest("routing.trace must be true, false or 'layers'", "routing.trace")
    what = "the body" if param is None else param
    raise InvalidRequest(f"{what}: {first['msg'][:1].lower()}{first['msg'][1:]}", param)


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> tuple[Prompt, ...]:
    if isinstance(prompt, str):
        return (prompt,)
    ids = tuple(part for part in prompt if isinstance(part, int))
    if ids:
        return (TokenIds(ids),)
    return tuple(
        TokenIds(tuple(part)) if isinstance(part, list) else part for part in prompt if not isinstance(part, int)
    )


def _biases(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    if wrong := [token for token in given if not (token.isdecimal() and len(token) <= _MAX_DIGITS)]:
        raise InvalidRequest(f"logit_bias: {wrong[0]!r} is no token id", "logit_bias")
    return tuple((int(token), value) for token, value in given.items())
