"""What a caller asks: a prompt, and options that both protocols have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypedDict

Mode = Literal["auto", "auto-sequence", "named", "blend", "base"]
VoteRule = Literal["majority", "last"]


class Message(TypedDict):
    """One message of a conversation: its ``role`` (system, user or assistant) and its ``content``."""

    role: str
    content: str


Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | Sequence[Message]
"""A text, several texts, token ids, several lists of token ids, or a conversation whose next turn is wanted."""


@dataclass(frozen=True, slots=True)
class Routing:
    """Which experts act; what is None is left to ``model`` and to the bank.

    Attributes:
        mode: How they are chosen.
        experts: The one of ``named``, with weight 1, or those of ``blend``, by name with their weights.
        top_k: Experts a token uses under ``auto``.
        temperature: Divides the chosen gate logits under ``auto``.
        vote: How the bank's layer routers decide under ``auto-sequence``.
        trace: Whether the answer reports each expert's share for every token; ``layers`` for the dominating expert of
            each decoder layer as well.
    """

    mode: Mode | None = None
    experts: Mapping[str, float] = field(default_factory=dict)
    top_k: int | None = None
    temperature: float | None = None
    vote: VoteRule | None = None
    trace: bool | Literal["layers"] = False


class Options(TypedDict, total=False):
    """Everything about a call but its prompt; what is absent gets the service's default.

    Attributes:
        model: ``auto``, ``auto-sequence``, an expert, a blend such as ``a:0.7,b:0.3``, or ``base``.
        routing: The same choice in fields of its own, and more.
        max_tokens: Most tokens of an answer. Without it a text gets 16 over HTTP, as OpenAI has it; everything else
            gets as many as fit into the context.
        n: Answers to each prompt.
        stop: Texts that end an answer where they appear.
        seed: Makes the answer repeatable.
        temperature: 0 takes the most probable token.
        top_p: Draws only from the most probable tokens that together reach this probability.
        top_k: Draws only from this many most probable tokens.
        min_p: Draws only from tokens with at least this part of the largest probability.
        presence_penalty: Taken off the logits of tokens that the answer has.
        frequency_penalty: Taken off for every time it has them.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that prompt or answer have.
        logit_bias: Added to logits, by token id.
        top_logprobs: How many of the most probable tokens to report with every token; 0 reports the token alone.
        json: True for answers that are JSON objects, a JSON schema for answers that follow it.
        ignore_eos: Whether to go on after the end-of-sequence token.
    """

    model: str
    routing: Routing
    max_tokens: int
    n: int
    stop: Sequence[str]
    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    top_logprobs: int
    json: Literal[True] | Mapping[str, object]
    ignore_eos: bool


@dataclass(frozen=True, slots=True)
class Question:
    """One call, as the transports take it.

    Attributes:
        prompt: What to answer.
        options: How.
    """

    prompt: Prompt
    options: Options
