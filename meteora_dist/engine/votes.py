"""The layer routers' votes on the prompts that asked for them, between the passes that read a prompt and its delivery.

Shapes: L decoder layers, H hidden size.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import FutureRequestState

from meteora_dist.engine.request import GenerationRequest
from meteora_dist.moe.routers import LayerRouters, Span

Votes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ballot:
    """A request's part of a pass on which routers are to vote.

    Attributes:
        future: The request's part of the batch.
        request: The request.
        span: Its tokens in the pass.
        routers: Of its bank generation.
    """

    future: FutureRequestState
    request: GenerationRequest
    span: Span
    routers: LayerRouters


class VoteKeeper:
    """Keeps the votes of the newest pass, and the pooled states of prompts that are not through yet."""

    def __init__(self) -> None:
        """Starts empty."""
        self._votes: dict[str, Votes] = {}
        self._sums: dict[str, Tensor] = {}

    def note(self, ballots: Sequence[Ballot], pooled: Sequence[Tensor], active: Collection[str]) -> None:
        """Takes what a pass has pooled.

        Args:
            ballots: Of the pass.
            pooled: Their pooled states, [ballots, H] for every layer.
            active: The ids of all requests under way.
        """
        self._votes.clear()
        self._sums = {key: sum_LH for key, sum_LH in self._sums.items() if key in active}
        for ballot, pooled_LH in zip(ballots, torch.stack(list(pooled), dim=1) if ballots else (), strict=True):
            key = ballot.request.request_id
            if ballot.span.pooling == "mean":
                # A prompt that starts anew, because it lost its place in the cache, is counted anew.
                started = ballot.future.state.position_offset == ballot.future.query_length
                before_LH = None if started else self._sums.pop(key, None)
                pooled_LH = pooled_LH if before_LH is None else pooled_LH + before_LH
            if ballot.future.has_new_token:
                self._votes[key] = ballot.routers.votes(pooled_LH)
            elif ballot.span.pooling == "mean":
                self._sums[key] = pooled_LH

    def take(self, request_id: str) -> Votes | None:
        """The votes that go with a request's newest token."""
        return self._votes.pop(request_id, None)


def ballots_of(
    futures: Sequence[FutureRequestState],
    requests: Sequence[GenerationRequest],
    routers: Mapping[int, LayerRouters],
) -> list[Ballot]:
    """The parts of a pass on which routers vote.

    Args:
        futures: All parts of the pass, in order.
        requests: Theirs.
        routers: Of the live generations that have some.
    """
    ballots, first = [], 0
    for future, request in zip(futures, requests, strict=True):
        if request.vote == "routers":
            assert request.generation is not None, "RankEngine names the generation of every request"
            own = routers[request.generation]
            ballots.append(Ballot(future, request, Span(first, future.query_length, own.pooling), own))
        first += future.query_length
    return ballots
