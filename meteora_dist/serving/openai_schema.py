"""The bodies of the OpenAI endpoints as they are accepted: every field typed, every unknown one refused by name."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meteora_dist.errors import InvalidRequest
from meteora_dist.serving.request import TextRequest, Turn

COMPLETION_MAX_TOKENS = 16
"""What OpenAI's completions endpoint produces when ``max_tokens`` is absent."""

_UNION_PARTS = frozenset({"str", "list[str]", "list[TextPart]"})
"""What pydantic adds to a field's path for the alternative it tried."""

Body = TypeVar("Body", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """How a stream is sent.

    Attributes:
        include_usage: Whether a last chunk carries the usage.
    """

    include_usage: bool | None = None


class RoutingOptions(_Strict):
    """Our extension: how experts are picked under ``auto``.

    Attributes:
        top_k: Experts a token uses; None for the bank's default.
        temperature: Divides the chosen gate logits; None for the bank's default.
        trace: Whether every choice reports each expert's share for every token.
    """

    top_k: int | None = None
    temperature: float | None = None
    trace: bool = False


class GenerationBody(_Strict):
    """What both endpoints take; ranges are checked where both protocols meet, in :class:`TextRequest`."""

    model: str = "auto"
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    routing: RoutingOptions | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def text_request(self, prompt: str | tuple[Turn, ...], max_tokens: int | None) -> TextRequest:
        """The protocol-independent request.

        Raises:
            InvalidRequest: ``n`` is not 1, or ``stream_options`` came without ``stream``.
        """
        if self.n not in (None, 1):
            raise InvalidRequest(f"n is {self.n}, but this service gives one choice a request", "n")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options is only allowed when stream is true", "stream_options")
        routing = self.routing or RoutingOptions()
        return TextRequest(
            prompt=prompt,
            model=self.model,
            max_tokens=max_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            top_k=routing.top_k,
            gate_temperature=routing.temperature,
            trace=routing.trace,
        )


class CompletionBody(GenerationBody):
    """The body of ``POST /v1/completions``.

    Attributes:
        prompt: The text to continue.
    """

    prompt: str

    def to_request(self) -> TextRequest:
        """The protocol-independent request; raises InvalidRequest."""
        return self.text_request(self.prompt, COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens)


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """One message of a conversation; ``developer`` is another word for ``system``."""

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
        messages: The conversation; the answer is the assistant's next turn.
        max_completion_tokens: The newer name of ``max_tokens``.
    """

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None

    def to_request(self) -> TextRequest:
        """The protocol-independent request; raises InvalidRequest."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequest("max_tokens and max_completion_tokens exclude each other", "max_tokens")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.text_request(tuple(message.to_turn() for message in self.messages), limit)


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
    if param == "prompt" and first["type"] == "string_type":
        raise InvalidRequest("prompt must be one string; lists of texts or token ids are not supported", param)
    what = "the body" if param is None else param
    raise InvalidRequest(f"{what}: {first['msg'][:1].lower()}{first['msg'][1:]}", param)
