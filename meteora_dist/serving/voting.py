"""``auto-sequence``: one vote over a prompt names the expert of the whole answer. Routers vote, or else the gates.

The vote is a request of one token, so that it is batched like any other. Its token is not used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from meteora_dist.bank.manifest import VoteRule
from meteora_dist.engine.request import GenerationRequest, Sampling, TokenEvent
from meteora_dist.moe.routers import elect
from meteora_dist.moe.routing import named


@dataclass(frozen=True, slots=True)
class Decided:
    """One answer's request, with its bank generation and its experts.

    Attributes:
        request: For the engine.
        votes: How many layer routers voted for each expert of the generation; empty where none did.
    """

    request: GenerationRequest
    votes: tuple[int, ...] = ()


def ballot(answer: GenerationRequest, routers: bool) -> GenerationRequest:
    """The request that makes routers, or the gates, vote on the prompt of ``answer``, routed as that one is."""
    return replace(
        answer,
        request_id=f"{answer.request_id}-vote",
        max_tokens=1,
        sampling=Sampling(),
        trace=False,
        trace_layers=False,
        ignore_eos=False,
        top_logprobs=None,
        grammar=None,
        vote="routers" if routers else "gates",
    )


def decided(answer: GenerationRequest, outcome: TokenEvent, experts: int, rule: VoteRule) -> Decided:
    """An answer with the expert that the vote on its prompt has chosen.

    Args:
        answer: Its request.
        outcome: What the ballot's token reported.
        experts: Of the bank generation.
        rule: How routers decide. Gates decide by the most weight over the prompt, all its tokens and all routed linears
            together.
    """
    if outcome.votes is not None:
        counts = tuple(outcome.votes.count(expert) for expert in range(experts))
        return Decided(replace(answer, routing=named(elect(outcome.votes, rule))), counts)
    assert outcome.shares, "a vote of the gates ends with their shares"
    return Decided(replace(answer, routing=named(outcome.shares.index(max(outcome.shares)))))
