"""What an engine is asked for and what it answers: plain data, cheap to send between processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from meteora_dist.moe.routing import RoutingChoice

FinishReason = Literal["stop", "length"]
Voters = Literal["gates", "routers"]

LayerExperts = tuple[tuple[int, float], ...]
"""For each decoder layer the expert with the largest share of its gate weight, and that share, averaged over the
layer's routed linears; (-1, 0.0) where no expert acted."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn: biases and penalties first, then the temperature, then the cuts, then the draw.

    Attributes:
        temperature: 0 takes the most probable token (greedy); above, logits are divided by it.
        top_p: Only the smallest set of most probable tokens whose probabilities reach this sum is drawn from.
        seed: Draws depend on (seed, position) alone, never on what else is in the batch; the position is the number
            of tokens before the drawn one, prompt included.
        top_k: Only this many most probable tokens are drawn from; 0 for all.
        min_p: Only tokens with at least this part of the largest probability are drawn from.
        presence_penalty: Taken off the logit of every token that the answer has already.
        frequency_penalty: Taken off for every time the answer has it.
        repetition_penalty: Divides the positive and multiplies the negative logits of tokens that prompt or answer
            have (CTRL, arXiv 1909.05858).
        logit_bias: (token id, value added to its logit).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()


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
        top_logprobs: How many of the most probable tokens every token reports beside its own probability; None for no
            report.
        grammar: What the answer must match, in llguidance's own notation; None for anything.
        vote: Who votes on the prompt: with ``gates`` the first token reports the shares over the whole prompt instead
            of its own position's, with ``routers`` the choice of every layer's router. None when nobody does.
        resumed: How many tokens at the end of ``prompt_ids`` are the answer's own, produced before.
        trace_layers: With ``trace``, whether every token reports the dominating expert of each layer as well.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    routing: RoutingChoice = field(default_factory=RoutingChoice)
    trace: bool = False
    ignore_eos: bool = False
    generation: int | None = None
    top_logprobs: int | None = None
    grammar: str | None = None
    vote: Voters | None = None
    resumed: int = 0
    trace_layers: bool = False

    def after(self, tokens: Sequence[int]) -> GenerationRequest:
        """What is left of the request once it has produced ``tokens``, fewer than ``max_tokens`` of them.

        It has the same positions as the request itself, and so the same draws.
        """
        return replace(
            self,
            prompt_ids=(*self.prompt_ids, *tokens),
            max_tokens=self.max_tokens - len(tokens),
            resumed=self.resumed + len(tokens),
        )


@dataclass(frozen=True, slots=True)
class Logprobs:
    """What the model itself thought of a token, before biases, penalties, grammar, temperature and cuts.

    Attributes:
        token: Natural logarithm of the produced token's probability.
        top: (token id, the same of it) of the most probable tokens, most probable first.
    """

    token: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One produced token.

    Attributes:
        token_id: The token.
        finish_reason: None while more follow; "stop" for end of sequence, "length" for ``max_tokens`` reached.
        shares: With tracing on, each expert's share of the gate weight at the position that produced this token,
            averaged over all routed linears, in expert order; sums to 1, or is all zeros for mode ``base``.
        logprobs: What was asked for with ``top_logprobs``.
        votes: With a vote of the routers, the expert that each layer's router chose, from the first layer to the last.
        layers: With ``trace_layers``, who dominates each layer at the position that produced this token.
    """

    token_id: int
    finish_reason: FinishReason | None = None
    shares: tuple[float, ...] | None = None
    logprobs: Logprobs | None = None
    votes: tuple[int, ...] | None = None
    layers: LayerExperts | None = None
