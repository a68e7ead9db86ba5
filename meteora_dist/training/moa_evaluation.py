"""How good a bank's experts and routers are on held-out rows.

Routers are always judged as they vote in use: on the base model's hidden states.

Shapes: B sequences, D decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from meteora_dist.moe.routers import elect
from meteora_dist.training.gate_loss import IGNORE
from meteora_dist.training.moa_data import DomainBatch
from meteora_dist.training.moa_objective import MoaObjective


@dataclass(frozen=True, slots=True)
class DomainScore:
    """One domain's held-out rows.

    Attributes:
        rows: How many they are.
        perplexity: exp of the mean cross-entropy of the answers' tokens, each row with its own expert alone.
        router_accuracy: Share of right votes, over rows and layers.
        majority: Share of rows whose majority names the right expert.
        last: Share of rows whose last layer does.
    """

    rows: int
    perplexity: float
    router_accuracy: float
    majority: float
    last: float


@dataclass(frozen=True, slots=True)
class MoaScores:
    """All domains' held-out rows.

    Attributes:
        domains: By the expert's name.
        layers: Share of right votes of every layer's router, over all rows.
    """

    domains: Mapping[str, DomainScore]
    layers: tuple[float, ...]

    @property
    def mean(self) -> dict[str, float]:
        """Means over domains."""
        fields = ("perplexity", "router_accuracy", "majority", "last")
        scores = self.domains.values()
        return {field: sum(getattr(score, field) for score in scores) / len(scores) for field in fields}

    def as_json(self) -> dict[str, object]:
        """For a line of the run's log."""
        domains = {name: asdict(score) for name, score in self.domains.items()}
        return {"domains": domains, "mean": self.mean, "layers": self.layers}


class HeldOut:
    """The held-out rows of all domains; the base model's states of their prompts are computed once."""

    def __init__(self, objective: MoaObjective, batches: Sequence[DomainBatch], names: Mapping[int, str]) -> None:
        """Takes the batches and the experts' names by index."""
        self._objective = objective
        self._batches = batches
        self._names = names
        self._states: list[Tensor] = []

    @torch.no_grad()
    def scores(self) -> MoaScores:
        """Of the objective as it is now."""
        if not self._states:
            self._states = [self._objective.base_states(batch) for batch in self._batches]
        self._objective.install()
        experts = torch.tensor([expert for batch in self._batches for expert in batch.experts])
        lm_B = torch.cat([self._objective.language_losses(batch)[0].cpu() for batch in self._batches])
        tokens_B = torch.cat([(batch.labels_BL[:, 1:] != IGNORE).sum(1).cpu() for batch in self._batches])
        votes_DB = torch.cat([self._objective.logits(states).argmax(-1).cpu() for states in self._states], dim=1)
        domains = {}
        for expert, name in self._names.items():
            own_B = experts == expert
            votes = votes_DB[:, own_B]
            ballots = votes.T.tolist()
            domains[name] = DomainScore(
                rows=len(ballots),
                perplexity=math.exp(float(lm_B[own_B].sum() / tokens_B[own_B].sum())),
                router_accuracy=float((votes == expert).float().mean()),
                majority=sum(elect(ballot, "majority") == expert for ballot in ballots) / len(ballots),
                last=sum(elect(ballot, "last") == expert for ballot in ballots) / len(ballots),
            )
        layers = (votes_DB == experts).float().mean(1)
        return MoaScores(domains, tuple(layers.tolist()))
