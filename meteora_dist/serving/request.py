"""What both protocols turn a call into, and what they turn back into an answer: plain text in, plain text out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from meteora_dist.engine.request import FinishReason, LayerExperts, Sampling
from meteora_dist.serving.selection import Selection


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
class TokenIds:
    """A prompt that is tokenized already."""

    ids: tuple[int, ...]


Prompt = str | TokenIds | tuple[Turn, ...]
"""Text to continue, tokens to continue, or a conversation whose next turn is wanted."""


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One call: ``n`` answers to each of one or more prompts.

    Attributes:
        prompts: What to answer.
        model: Shown as the answer's model; what it stands for is ``selection``.
        selection: Which experts act.
        n: Answers to each prompt; the answers of one prompt differ by their seeds.
        max_tokens: Most tokens to produce for an answer; None for as many as fit into the context.
        sampling: How tokens are drawn; ``seed`` stands in the place of its seed.
        seed: None for a random one.
        stop: Texts that end the answer where they appear.
        ignore_eos: Whether to go on after the end-of-sequence token.
        top_logprobs: How many of the most probable tokens are reported with every token; None for no report.
        grammar: What answers must match, in llguidance's own notation; None for anything.
        trace: Whether every token reports the experts' shares.
        trace_layers: With ``trace``, whether it reports the dominating expert of each layer as well.
    """

    prompts: tuple[Prompt, ...]
    model: str = "auto"
    selection: Selection = field(default_factory=Selection)
    n: int = 1
    max_tokens: int | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    grammar: str | None = None
    trace: bool = False
    trace_layers: bool = False


@dataclass(frozen=True, slots=True)
class TokenTrace:
    """One produced token and who produced it.

    Attributes:
        token: The text it completed: empty inside a character of several tokens, and for special tokens.
        id: Its id.
        shares: Each expert's share of the gate weight, in the order of ``Piece.experts``.
        layers: With ``TextRequest.trace_layers``, the dominating expert of each layer, by its place in
            ``Piece.experts``, and its share there.
    """

    token: str
    id: int
    shares: tuple[float, ...]
    layers: LayerExperts | None = None


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and how probable the model found it.

    Attributes:
        id: Its id.
        text: Its bytes as text; a part of a character shows as U+FFFD.
        raw: Its bytes.
        logprob: Natural logarithm of its probability.
    """

    id: int
    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How probable one produced token was.

    Attributes:
        chosen: The token.
        top: The most probable ones at its place, most probable first.
        offset: Characters of the answer before it, those of a stop text included.
    """

    chosen: ScoredToken
    top: tuple[ScoredToken, ...]
    offset: int


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
    """What is new of one answer since its last piece.

    Attributes:
        text: New text; may be empty.
        index: Number of the answer: that of its prompt, times n, plus that among the prompt's answers.
        tokens: New tokens; empty unless the request asked for a trace.
        logprobs: New tokens; empty unless the request asked for them.
        experts: Names of the experts, in the order of the shares.
        dominating: With a trace, the expert with the largest share over all tokens so far; None when none acted.
        ending: Set in the answer's last piece only.
        votes: With a trace, how many layer routers voted for each of ``experts``; empty where none voted.
    """

    text: str
    index: int = 0
    tokens: tuple[TokenTrace, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    experts: tuple[str, ...] = ()
    dominating: str | None = None
    ending: Ending | None = None
    votes: tuple[int, ...] = ()

    @property
    def silent(self) -> bool:
        """Whether it has nothing that a caller would miss."""
        return not (self.text or self.tokens or self.logprobs or self.ending)


@dataclass(frozen=True, slots=True)
class Answer:
    """All pieces of one answer together; attributes as in :class:`Piece`."""

    text: str
    index: int
    tokens: tuple[TokenTrace, ...]
    logprobs: tuple[TokenLogprobs, ...]
    experts: tuple[str, ...]
    dominating: str | None
    ending: Ending
    votes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a whole call; a prompt counts once, however many answers it has.

    Attributes:
        prompt_tokens: Tokens of all prompts.
        completion_tokens: Tokens of all answers.
    """

    prompt_tokens: int
    completion_tokens: int


async def collect(pieces: AsyncIterator[Piece], answers: int) -> tuple[Answer, ...]:
    """The whole answers, by index, once their last pieces are there; ``answers`` is how many there will be."""
    received: list[list[Piece]] = [[] for _ in range(answers)]
    async for piece in pieces:
        received[piece.index].append(piece)
    return tuple(_joined(parts) for parts in received)


def usage_of(endings: tuple[Ending, ...], n: int) -> Usage:
    """The call's usage, from the endings of all its answers by index, ``n`` a prompt."""
    return Usage(sum(one.prompt_tokens for one in endings[::n]), sum(one.completion_tokens for one in endings))


def _joined(parts: list[Piece]) -> Answer:
    last = parts[-1]
    assert last.ending is not None, "the last piece has the ending"
    return Answer(
        text="".join(part.text for part in parts),
        index=last.index,
        tokens=tuple(token for part in parts for token in part.tokens),
        logprobs=tuple(token for part in parts for token in part.logprobs),
        experts=last.experts,
        dominating=last.dominating,
        ending=last.ending,
        votes=last.votes,
    )
