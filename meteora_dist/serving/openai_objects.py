"""The objects of the OpenAI endpoints as they are answered: what ``/openapi.json`` promises of ``openai_reply``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import SkipJsonSchema

Absent = SkipJsonSchema[None]
"""A field that is not there, rather than null, when it does not apply."""


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Usage(_Exact):
    """Tokens of a whole call."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenRouting(_Exact):
    """One produced token and each expert's share of the gate weight, in the order of ``experts``.

    With ``routing.trace`` set to ``layers``, ``layer_experts`` has the dominating expert of each decoder layer, by its
    place in ``experts`` or -1 where none acted, and ``layer_shares`` its share there.
    """

    token: str
    id: int
    shares: list[float]
    layer_experts: list[int] | Absent = None
    layer_shares: list[float] | Absent = None


class RoutingTrace(_Exact):
    """Which experts acted; there for those who asked with ``routing.trace``.

    ``votes`` says how many layer routers voted for each of ``experts``, where they did.
    """

    experts: list[str]
    dominating: str | None
    tokens: list[TokenRouting]
    votes: list[int] | Absent = None


class CompletionLogprobs(_Exact):
    """How probable the produced tokens were, in columns."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Exact):
    """One answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    routing: RoutingTrace | Absent = None


class Completion(_Exact):
    """The answer of ``POST /v1/completions``."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionPart(_Exact):
    """What is new of one answer; its last part has the reason why it ended."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    routing: RoutingTrace | Absent = None


class CompletionChunk(_Exact):
    """An event of a stream; the one with the usage has no choices."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionPart]
    usage: Usage | None = None


class ScoredToken(_Exact):
    """A token and the natural logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(ScoredToken):
    """A produced token, with the most probable ones at its place."""

    top_logprobs: list[ScoredToken]


class ChatLogprobs(_Exact):
    """How probable the produced tokens were."""

    content: list[TokenLogprobs]
    refusal: None


class AssistantMessage(_Exact):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Exact):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    routing: RoutingTrace | Absent = None


class ChatCompletion(_Exact):
    """The answer of ``POST /v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(_Exact):
    """What is new of the assistant's turn; the first part says who speaks."""

    role: Literal["assistant"] | Absent = None
    content: str


class ChatPart(_Exact):
    """What is new of one answer; its last part has the reason why it ended."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    routing: RoutingTrace | Absent = None


class ChatChunk(_Exact):
    """An event of a stream; the one with the usage has no choices."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatPart]
    usage: Usage | None = None


class Model(_Exact):
    """What a request may name as its model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Exact):
    """All of them."""

    object: Literal["list"]
    data: list[Model]


class Health(_Exact):
    """The service answers."""

    status: Literal["ok"]


class ErrorDetail(_Exact):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Error(_Exact):
    """What every call that fails answers."""

    error: ErrorDetail
