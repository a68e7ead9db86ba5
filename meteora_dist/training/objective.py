"""What the training loop optimises: any module that turns a batch into a loss.

The loop knows nothing of gates or routers: an objective brings its own parameters, with their rates, and its own words
for what is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from meteora_dist.training.data import Batch

Sums = Mapping[str, Tensor]
"""Of one batch: what adds up over batches and workers, each a vector in fp32."""

Gather = Callable[[nn.Parameter], Tensor]
"""The whole of a parameter that may be sharded over the workers, fp32; collective."""


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters with one peak learning rate; None for the loop's own."""

    parameters: list[nn.Parameter]
    learning_rate: float | None = None


class Objective(nn.Module, ABC):
    """A loss over batches. Everything trained is a registered parameter; everything else has no gradient."""

    @abstractmethod
    def counts(self, batch: Batch) -> tuple[int, ...]:
        """What the terms of the loss are means over, such as positions: for each term how many the batch has."""

    @abstractmethod
    def forward(self, batch: Batch, scales: Sequence[float]) -> tuple[Tensor, Sums]:
        """The batch's part of the loss, and its sums.

        Args:
            batch: On the objective's device.
            scales: For each of ``counts`` what one of them weighs: a term is its scale times a sum. The loop sets them
                so that the mean of the losses of all workers and accumulations has the means over all of them.
        """

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """All trained parameters."""

    @abstractmethod
    def metrics(self, sums: Mapping[str, Tensor]) -> dict[str, float]:
        """Metrics by name, from sums over all that was passed. Slashes make sections: ``gate_ce/layer/3``."""

    @abstractmethod
    def export(self, gather: Gather) -> dict[str, Tensor]:
        """The trained tensors by name, on the CPU, whole. Collective."""


class TrainingData(Protocol):
    """The batches of a run; see ``meteora_dist.training.task_data.TaskData``."""

    def training(self, step: int, rank: int, world: int) -> list[Batch]:
        """The batches that worker ``rank`` of ``world`` passes in step number ``step``, one an accumulation."""

    def held_out(self, rank: int, world: int) -> list[Batch]:
        """The worker's share of the held-out rows; every worker gets equally many batches."""
