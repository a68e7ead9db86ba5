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
    """Tokens of a whole call.

    Attributes:
        prompt_tokens: Of all prompts, each counted once.
        completion_tokens: Produced for all answers, end-of-sequence tokens included.
        total_tokens: Both together.
    """

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TokenRouting(_Exact):
    """One produced token and who acted on it.

    Attributes:
        token: The text this token completed; empty inside a character of several tokens, and for special tokens.
        id: Its id.
        shares: Each expert's share of the gate weight at the position that produced this token, averaged over all
            routed linears, in the order of ``experts``. They sum to 1, or are all 0 where no expert acted.
        layer_experts: When ``routing.trace`` is ``layers``: the expert with the largest share in each decoder layer,
            from the first, by its place in ``experts``; -1 where no expert acted.
        layer_shares: Likewise: that share, averaged over the layer's routed linears.
    """

    token: str
    id: int
    shares: list[float]
    layer_experts: list[int] | Absent = None
    layer_shares: list[float] | Absent = None


class RoutingTrace(_Exact):
    """Which experts acted; there for those who asked with ``routing.trace``.

    Attributes:
        experts: Names, in the order of ``shares`` and ``votes``: those that the caller may use.
        dominating: The expert with the largest share over all tokens so far; null when no expert acted.
        tokens: One entry a produced token; in a stream, those that are new.
        votes: How many layer routers voted for each of ``experts``; absent where none voted.
    """

    experts: list[str]
    dominating: str | None
    tokens: list[TokenRouting]
    votes: list[int] | Absent = None


class CompletionLogprobs(_Exact):
    """How probable the produced tokens were, in columns.

    Attributes:
        tokens: Their texts; of a part of a character ``bytes:`` and its bytes in hex.
        token_logprobs: Natural logarithms of their probabilities, before biases, penalties, grammar, temperature
            and cuts.
        top_logprobs: The most probable tokens at the place of each, and the logarithms of their probabilities.
        text_offset: Where the text of each begins in the answer, in characters.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Exact):
    """One answer.

    Attributes:
        index: Number of the answer: that of its prompt, times n, plus that among the prompt's answers.
        text: What was produced.
        logprobs: When the request asked for them; null otherwise.
        finish_reason: ``stop``: the model ended its answer, or a stop text appeared. ``length``: ``max_tokens``
            were produced.
        routing: When the request asked for a trace; absent otherwise.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]
    routing: RoutingTrace | Absent = None


class Completion(_Exact):
    """The answer of ``POST /v1/completions``.

    Attributes:
        id: Identifies the call in the service's logs.
        object: What this is.
        created: When, in seconds of the Unix epoch.
        model: As the request named it.
        choices: All answers, by index.
        usage: Tokens of the call.
    """

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionPart(_Exact):
    """What is new of one answer.

    Attributes:
        index: Number of the answer: that of its prompt, times n, plus that among the prompt's answers.
        text: What is new; it may be empty.
        logprobs: When the request asked for them; null otherwise.
        finish_reason: Why the answer ended, in its last part; null before. ``stop`` or ``length``, as in a whole
            answer.
        routing: When the request asked for a trace; absent otherwise.
    """

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    routing: RoutingTrace | Absent = None


class CompletionChunk(_Exact):
    """An event of a stream; the one with the usage has no choices.

    Attributes:
        id: Identifies the call in the service's logs.
        object: What this is.
        created: When, in seconds of the Unix epoch.
        model: As the request named it.
        choices: One part of one answer.
        usage: In the last event, for those who asked with ``stream_options.include_usage``; null before it.
    """

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionPart]
    usage: Usage | None = None


class ScoredToken(_Exact):
    """A token and how probable it was.

    Attributes:
        token: Its text; a part of a character shows as U+FFFD.
        logprob: Natural logarithm of its probability, before biases, penalties, grammar, temperature and cuts.
        bytes: Its bytes.
    """

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprobs(ScoredToken):
    """A produced token, with the most probable ones at its place.

    Attributes:
        top_logprobs: Those, most probable first.
    """

    top_logprobs: list[ScoredToken]


class ChatLogprobs(_Exact):
    """How probable the produced tokens were.

    Attributes:
        content: One entry a produced token.
        refusal: Always null: there are no refusals.
    """

    content: list[TokenLogprobs]
    refusal: None


class AssistantMessage(_Exact):
    """The assistant's turn.

    Attributes:
        role: Who speaks.
        content: What was produced.
        refusal: Always null.
    """

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Exact):
    """One answer.

    Attributes:
        index: Number of the answer.
        message: The answer.
        logprobs: When the request asked for them; null otherwise.
        finish_reason: ``stop``: the model ended its answer, or a stop text appeared. ``length``: ``max_tokens``
            were produced.
        routing: When the request asked for a trace; absent otherwise.
    """

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    routing: RoutingTrace | Absent = None


class ChatCompletion(_Exact):
    """The answer of ``POST /v1/chat/completions``.

    Attributes:
        id: Identifies the call in the service's logs.
        object: What this is.
        created: When, in seconds of the Unix epoch.
        model: As the request named it.
        choices: All answers, by index.
        usage: Tokens of the call.
    """

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(_Exact):
    """What is new of the assistant's turn.

    Attributes:
        role: Who speaks; in the first part only.
        content: What is new; it may be empty.
    """

    role: Literal["assistant"] | Absent = None
    content: str


class ChatPart(_Exact):
    """What is new of one answer.

    Attributes:
        index: Number of the answer.
        delta: What is new.
        logprobs: When the request asked for them; null otherwise.
        finish_reason: Why the answer ended, in its last part; null before. ``stop`` or ``length``, as in a whole
            answer.
        routing: When the request asked for a trace; absent otherwise.
    """

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    routing: RoutingTrace | Absent = None


class ChatChunk(_Exact):
    """An event of a stream; the one with the usage has no choices.

    Attributes:
        id: Identifies the call in the service's logs.
        object: What this is.
        created: When, in seconds of the Unix epoch.
        model: As the request named it.
        choices: One part of one answer.
        usage: In the last event, for those who asked with ``stream_options.include_usage``; null before it.
    """

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatPart]
    usage: Usage | None = None


class Model(_Exact):
    """What a request may name as its model.

    Attributes:
        id: The name.
        object: What this is.
        created: When this replica started, in seconds of the Unix epoch.
        owned_by: ``meteora``.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(_Exact):
    """Everything the caller may name.

    Attributes:
        object: What this is.
        data: Modes first, then experts in the order of routing shares.
    """

    object: Literal["list"]
    data: list[Model]


class Health(_Exact):
    """The service answers.

    Attributes:
        status: ``ok``; anything else is an error with status 503.
    """

    status: Literal["ok"]


class ErrorDetail(_Exact):
    """What went wrong.

    Attributes:
        message: What was wrong, where, and what would be right.
        type: OpenAI's class of the error.
        param: The field at fault; null when no field is.
        code: The kind of error: see the table of errors.
    """

    message: str
    type: str
    param: str | None
    code: str


class Error(_Exact):
    """What every call that fails answers.

    Attributes:
        error: What went wrong.
    """

    error: ErrorDetail
