"""What an engine is asked for and what it answers: plain data, cheap to send between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from meteora_dist.moe.routing import RoutingChoice

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 takes the most probable token (greedy); above, logits are divided by it.
        top_p: Only the smallest set of most probable tokens whose probabilities reach this sum is drawn from.
        seed: Draws depend on (seed, position) alone, never on what else is in the batch; the position is the number
            of tokens before the drawn one, prompt included.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt to continue.

    Attributes:
        request_id: Unique among the live requests of the engine.
        prompt_ids: Token ids of the prompt, at least one.
        max_tokens: Most tokens to produce, at least one.
        sampling: How tokens are drawn.
        routing: Which experts act on this request's tokens.
        trace: Whether every token reports the experts' shares.
        ignore_eos: Whether to go on after the end-of-sequence token.
        generation: Number of the bank generation that ``routing`` and the shares refer to, and whose gates and experts
            the request uses to its end; None for the engine's newest.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    routing: RoutingChoice = field(default_factory=RoutingChoice)
    trace: bool = False
    ignore_eos: bool = False
    generation: int | None = None

    def after(self, tokens: Sequence[int]) -> GenerationRequest:
        """What is left of the request once it has produced ``tokens``, fewer than ``max_tokens`` of them.

        It has the same positions as the request itself, and so the same draws.
        """
        return replace(self, prompt_ids=(*self.prompt_ids, *tokens), max_tokens=self.max_tokens - len(tokens))


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One produced token.

    Attributes:
        token_id: The token.
        finish_reason: None while more follow; "stop" for end of sequence, "length" for ``max_tokens`` reached.
        shares: With tracing on, each expert's share of the gate weight at the position that produced this token,
            averaged over all routed linears, in expert order; sums to 1, or is all zeros for mode ``base``.
    """

    token_id: int
    finish_reason: FinishReason | None = None
    shares: tuple[float, ...] | None = None
