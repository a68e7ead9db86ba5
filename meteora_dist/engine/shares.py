"""The experts' shares that requests asked for, between the pass that made them and their delivery.

Shapes: E experts of a generation, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from transformers.generation.continuous_batching.requests import FutureRequestState

from meteora_dist.engine.request import GenerationRequest, LayerExperts
from meteora_dist.moe.routing import NO_EXPERT, LiveGeneration, PassRouting

Shares = tuple[float, ...]


class ShareKeeper:
    """Keeps the shares of the newest pass, and the sums of prompts that are not through yet."""

    def __init__(self) -> None:
        """Starts empty."""
        self._shares: dict[str, Shares] = {}
        self._sums: dict[str, Tensor] = {}
        self._layers: dict[str, LayerExperts] = {}

    def start(self, active: Collection[str]) -> None:
        """Begins a pass; ``active`` are the ids of all requests under way."""
        self._shares.clear()
        self._layers.clear()
        self._sums = {key: sum_E for key, sum_E in self._sums.items() if key in active}

    def note(
        self,
        future: FutureRequestState,
        request: GenerationRequest,
        first: int,
        step: PassRouting | None,
        live: LiveGeneration,
    ) -> None:
        """Takes one request's part of the pass that has just run.

        Args:
            future: The request's part of the batch.
            request: The request.
            first: Place of its first token in the pass.
            step: The routing of the pass; None when it used no expert.
            live: The generation of the request.
        """
        length = future.query_length
        if request.vote == "gates":
            # A prompt that starts anew, because it lost its place in the cache, is counted anew.
            started = future.state.position_offset == length
            before_E = None if started else self._sums.pop(request.request_id, None)
            sum_E = _shares(step, first, length, live) + (0 if before_E is None else before_E)
            if future.has_new_token:
                self._shares[request.request_id] = tuple((sum_E / len(request.prompt_ids)).tolist())
            else:
                self._sums[request.request_id] = sum_E
        elif request.trace and future.has_new_token:
            last_E = _shares(step, first + length - 1, 1, live)
            self._shares[request.request_id] = tuple(last_E.tolist())
            if request.trace_layers:
                self._layers[request.request_id] = _layer_experts(step, first + length - 1, live)

    def take(self, request_id: str) -> Shares | None:
        """The shares that go with a request's newest token."""
        return self._shares.pop(request_id, None)

    def take_layers(self, request_id: str) -> LayerExperts | None:
        """Who dominates each layer at the position of a request's newest token."""
        return self._layers.pop(request_id, None)


def _shares(step: PassRouting | None, first: int, tokens: int, live: LiveGeneration) -> Tensor:
    """Sum over neighbouring tokens of the pass, averaged over the routed linears: [E]."""
    sum_E = None if step is None else step.shares_of(first, tokens)
    return torch.zeros(live.num_experts) if sum_E is None else sum_E.cpu() / live.num_linears


def _layer_experts(step: PassRouting | None, token: int, live: LiveGeneration) -> LayerExperts:
    """The dominating expert of each layer at one token of the pass; of equal ones the first."""
    if step is None:
        return ((NO_EXPERT, 0.0),) * len(live.linears_L)
    linears_L1 = torch.tensor(live.linears_L).clamp_min(1)[:, None]
    shares_L, ids_L = (step.layer_shares_of(token).cpu() / linears_L1).max(1)
    pairs = zip(ids_L.tolist(), shares_L.tolist(), strict=True)
    return tuple((expert, share) if share > 0 else (NO_EXPERT, 0.0) for expert, share in pairs)
