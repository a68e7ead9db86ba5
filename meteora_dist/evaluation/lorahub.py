"""LoraHub (arXiv 2307.13269): one fixed weight an expert, found on a few examples without gradients.

As there: five examples, forty evaluations, weights from -1.5 to 1.5 that start at 0, and 0.05 times their mean size
added to the loss. Other than there: CMA-ES (the library ``cma``) searches instead of Nevergrad's portfolio, and the
weights act on the experts' deltas, not on their A and B matrices apart, so that mixed ranks need no padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from meteora_dist.errors import EvaluationError
from meteora_dist.evaluation.forced import Passage, answer_nll
from meteora_dist.moe.routed_model import RoutedModel
from meteora_dist.moe.routing import RoutingChoice

LIMIT = 1.5
PENALTY = 0.05
SPREAD = 0.5
"""Standard deviation of the first weights that are tried, around 0."""


@dataclass(frozen=True, slots=True)
class HubSearch:
    """How weights are searched: examples, evaluations, seed."""

    examples: int = 5
    evaluations: int = 40
    seed: int = 0


def search_weights(routed: RoutedModel, passages: Sequence[Passage], search: HubSearch) -> tuple[float, ...]:
    """The best weights that the search has tried, one an expert; zeros, the base model, are the first try.

    Raises:
        EvaluationError: There is only one expert.
    """
    tokens = sum(len(passage.answer) for passage in passages)

    def loss(weights: Sequence[float]) -> float:
        choice = RoutingChoice(mode="fixed", experts=tuple(enumerate(float(weight) for weight in weights)))
        nll = sum(answer_nll(routed, passage, choice) for passage in passages)
        return nll / tokens + PENALTY * sum(map(abs, weights)) / len(weights)

    experts = routed.num_experts
    best = (0.0,) * experts
    if experts < 2:
        raise EvaluationError("lorahub weighs experts against each other; the bank has only one")
    lowest = loss(best)
    strategy = _strategy(experts, search.seed)
    left = search.evaluations - 1
    while left > 0:
        tried = strategy.ask()
        losses = [loss(weights) for weights in tried]
        strategy.tell(tried, losses)
        left -= len(tried)
        if min(losses) < lowest:
            lowest = min(losses)
            best = tuple(float(weight) for weight in tried[losses.index(lowest)])
    return best


def _strategy(experts: int, seed: int) -> Any:
    import cma

    # Seed 0 would mean the time of day to cma.
    options = {"seed": seed + 1, "bounds": [-LIMIT, LIMIT], "verbose": -9}
    return cma.CMAEvolutionStrategy([0.0] * experts, SPREAD, options)
