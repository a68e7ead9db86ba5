"""What both protocols turn a call into, and what they turn back into an answer: plain text in, plain text out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from meteora_dist.engine.request import FinishReason
from meteora_dist.errors import InvalidRequest

MAX_STOPS = 4
MAX_TEMPERATURE = 2.0


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: What was said.
    """

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One prompt to answer.

    Attributes:
        prompt: Text to continue, or a conversation whose next turn is wanted.
        model: ``auto``, ``base`` or the name of an expert.
        max_tokens: Most tokens to produce; None for as many as fit into the context.
        temperature: 0 takes the most probable token; up to ``MAX_TEMPERATURE``.
        top_p: Probability mass that is drawn from, in (0, 1].
        seed: None for a random one.
        stop: Texts that end the answer where they appear.
        top_k: Experts a token uses; None for the bank's default.
        gate_temperature: Divides the chosen gate logits; None for the bank's default.
        trace: Whether every token reports the experts' shares.
    """

    prompt: str | tuple[Turn, ...]
    model: str = "auto"
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_k: int | None = None
    gate_temperature: float | None = None
    trace: bool = False

    def check(self) -> None:
        """Raises InvalidRequest, naming the field, for a value out of its range."""
        _demand(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        in_range = 0 <= self.temperature <= MAX_TEMPERATURE
        _demand(in_range, "temperature", self.temperature, f"between 0 and {MAX_TEMPERATURE:g}")
        _demand(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _demand(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", self.seed, "a 64-bit integer")
        _demand(len(self.stop) <= MAX_STOPS, "stop", f"{len(self.stop)} texts", f"at most {MAX_STOPS}")
        _demand(all(self.stop), "stop", "an empty text", "a text that can appear in the answer")
        _demand(self.top_k is None or self.top_k >= 1, "routing.top_k", self.top_k, "at least 1")
        gate = self.gate_temperature
        finite = gate is None or 0 < gate < float("inf")
        _demand(finite, "routing.temperature", gate, "above 0 and finite")
        _demand(self.prompt != (), "messages", "an empty list", "at least one message")


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """One produced token and who produced it.

    Attributes:
        token: The text it completed: empty inside a character of several tokens, and for special tokens.
        id: Its id.
        shares: Each expert's share of the gate weight, in the order of the bank.
    """

    token: str
    id: int
    shares: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Ending:
    """How an answer ended.

    Attributes:
        finish_reason: ``stop`` for end of sequence or a stop text, ``length`` for ``max_tokens``.
        prompt_tokens: Tokens of the prompt.
        completion_tokens: Tokens produced, an end-of-sequence token included.
    """

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new since the last piece.

    Attributes:
        text: New text; may be empty.
        tokens: New tokens; empty unless the request asked for a trace.
        dominating: With a trace, the expert with the largest share over all tokens so far; None when none acted.
        ending: Set in the last piece only.
    """

    text: str
    tokens: tuple[TokenTrace, ...] = ()
    dominating: str | None = None
    ending: Ending | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """All pieces of one answer together; attributes as in :class:`Piece`."""

    text: str
    tokens: tuple[TokenTrace, ...]
    dominating: str | None
    ending: Ending


async def collect(pieces: AsyncIterator[Piece]) -> Answer:
    """The whole answer, once its last piece is there."""
    received = [piece async for piece in pieces]
    last = received[-1]
    assert last.ending is not None, "the last piece has the ending"
    tokens = tuple(token for piece in received for token in piece.tokens)
    return Answer("".join(piece.text for piece in received), tokens, last.dominating, last.ending)


def _demand(holds: bool, param: str, value: object, wanted: str) -> None:
    if not holds:
        raise InvalidRequest(f"{param} is {value}, but must be {wanted}", param)
