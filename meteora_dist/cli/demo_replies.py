"""What the service's answers become, whichever way they came in; an answer with something missing is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meteora_dist.errors import MeteoraError
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb

Json = dict[str, Any]

_WHOLE_AT_ONCE = 2
"""A stream of this few tokens may come in one piece."""


class AskFailed(MeteoraError):
    """A request was refused, broke off, or its answer is not complete."""


@dataclass(frozen=True, slots=True)
class Token:
    """One produced token.

    Attributes:
        text: What it added to the answer; empty for special tokens.
        shares: Each expert's share of the gate weight, in the order of the bank.
    """

    text: str
    shares: tuple[float, ...]

    @property
    def dominating(self) -> int:
        """Index of the expert with the largest share."""
        return self.shares.index(max(self.shares))


@dataclass(frozen=True, slots=True)
class Reply:
    """One whole answer.

    Attributes:
        text: The answer.
        tokens: Its tokens.
        dominating: The expert with the largest share over all tokens; None when none acted.
    """

    text: str
    tokens: tuple[Token, ...]
    dominating: str | None


def read_events(events: Sequence[str]) -> list[Json]:
    """The chunks in the data of server-sent events.

    Raises:
        AskFailed: One of them is an error, or the stream broke off before its end mark.
    """
    if not events or events[-1] != "[DONE]":
        chunk = json.loads(events[-1]) if events else {}
        reason = chunk["error"]["message"] if "error" in chunk else "it has no end mark"
        raise AskFailed(f"the stream broke off after {len(events)} events: {reason}")
    return [json.loads(event) for event in events[:-1]]


def from_json(parts: Sequence[Json], content: str) -> Reply:
    """The reply in one whole object, or in the chunks of a stream, of which the last carries the usage alone.

    Args:
        parts: OpenAI objects.
        content: Where a choice has its text: ``message`` or ``delta``.

    Raises:
        AskFailed: The end is missing, or the trace of a token.
        LookupError, TypeError: They have another shape.
    """
    choices = [part["choices"][0] for part in parts if part["choices"]]
    tokens = [Token(token["token"], tuple(token["shares"])) for one in choices for token in one["routing"]["tokens"]]
    text = "".join(one[content]["content"] for one in choices)
    last = choices[-1]
    produced = parts[-1]["usage"]["completion_tokens"]
    return _complete(text, tokens, last["routing"]["dominating"], last["finish_reason"] is not None, produced)


def from_messages(messages: Sequence[pb.GenerateResponse | pb.GenerateStreamResponse]) -> Reply:
    """The reply in one whole message, or in the messages of a stream; AskFailed as for :func:`from_json`."""
    choices = [
        message.choices[0] if isinstance(message, pb.GenerateResponse) else message.choice for message in messages
    ]
    tokens = [Token(token.token, tuple(token.shares)) for choice in choices for token in choice.routing.tokens]
    text = "".join(choice.text for choice in choices)
    last = choices[-1]
    finished = last.finish_reason != pb.FINISH_REASON_UNSPECIFIED
    return _complete(text, tokens, last.routing.dominating or None, finished, messages[-1].usage.completion_tokens)


def _complete(text: str, tokens: Sequence[Token], dominating: str | None, finished: bool, produced: int) -> Reply:
    if not finished:
        raise AskFailed("the answer has no end: its finish reason is missing")
    if not tokens or len(tokens) != produced:
        raise AskFailed(f"the routing trace has {len(tokens)} tokens, but {produced} were produced")
    return Reply(text, tuple(tokens), dominating)


def in_pieces(reply: Reply, pieces: int) -> Reply:
    """The reply of a stream that came in so many pieces; AskFailed when that is no stream."""
    if pieces == 1 and len(reply.tokens) > _WHOLE_AT_ONCE:
        raise AskFailed(f"the stream brought all its {len(reply.tokens)} tokens in one piece")
    return reply
