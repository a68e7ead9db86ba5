"""What a service answers, whichever protocol carried it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole call; a prompt counts once, however many answers it has.

    Attributes:
        prompt_tokens: Tokens of all prompts.
        completion_tokens: Tokens of all answers.
    """

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class TokenRouting:
    """One produced token and who produced it.

    Attributes:
        text: What it completed: empty inside a character of several tokens, and for special tokens.
        id: Its id.
        shares: Each expert's share, in the order of :attr:`RoutingTrace.experts`; all zeros when none acted.
        layer_experts: With ``trace="layers"``, the dominating expert of each decoder layer by its place in
            :attr:`RoutingTrace.experts`; -1 where none acted.
        layer_shares: Its share there.
    """

    text: str
    id: int
    shares: tuple[float, ...]
    layer_experts: tuple[int, ...] = ()
    layer_shares: tuple[float, ...] = ()

    @property
    def dominating(self) -> int | None:
        """The place of the expert with the largest share; None when none acted."""
        if not any(self.shares):
            return None
        return max(range(len(self.shares)), key=lambda place: self.shares[place])


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """Which experts acted.

    Attributes:
        experts: Names of all experts of the bank.
        tokens: The produced tokens; in a piece of a stream, the new ones.
        dominating: The expert with the largest share over all tokens so far; None when none acted.
        votes: How many layer routers voted for each of ``experts``; empty where none voted.
    """

    experts: tuple[str, ...]
    tokens: tuple[TokenRouting, ...]
    dominating: str | None
    votes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How probable one produced token was.

    Attributes:
        text: The token's bytes as text.
        logprob: Natural logarithm of its probability.
        top: (text, logprob) of the most probable tokens at its place, most probable first.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer.

    Attributes:
        text: Its text.
        index: Its number: that of its prompt, times n, plus that among the prompt's answers.
        finish_reason: ``stop`` for the end of the sequence or a stop text, ``length`` for ``max_tokens``.
        logprobs: One a token, when the call asked for ``top_logprobs``.
        routing: Set when the call asked for a trace.
    """

    text: str
    index: int
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] = ()
    routing: RoutingTrace | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of one answer in a stream.

    Attributes:
        text: New text; may be empty.
        index: The answer's number.
        finish_reason: Set in the answer's last piece only.
        logprobs: Of the new tokens.
        routing: With the new tokens.
        usage: Set in the last piece of the stream only.
    """

    text: str
    index: int
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    routing: RoutingTrace | None = None
    usage: Usage | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """All answers of one call.

    Attributes:
        id: Identifies the call in the service's logs.
        model: As the call named it.
        answers: By index.
        usage: Tokens of the call.
    """

    id: str
    model: str
    answers: tuple[Answer, ...]
    usage: Usage

    @property
    def text(self) -> str:
        """The text of the only answer; raises ValueError when there are several."""
        (answer,) = self.answers
        return answer.text
