"""The training loop of any objective: steps, metrics, looks at held-out rows, checkpoints.

Every worker runs it, in one default process group.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from meteora_dist.training.data import Batch
from meteora_dist.training.objective import Objective, Sums, TrainingData
from meteora_dist.training.settings import LoopSettings
from meteora_dist.training.zero import ZeroEngine


class Keeper(Protocol):
    """Where a run's checkpoints and metrics go."""

    def latest(self) -> AbstractContextManager[Path | None]:
        """Folder of the newest complete checkpoint; None before the first."""

    def keep(self, step: int, save: Callable[[Path], None]) -> None:
        """Makes a checkpoint of what ``save`` writes into a folder. Collective."""

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics after ``step`` updates; called on the first worker."""

    def resumed(self, step: int) -> None:
        """Is told that the run begins, or goes on, after ``step`` updates; called on the first worker."""

    def finished(self) -> None:
        """Is told that there will be no more reports; called on the first worker."""


class Meter:
    """Adds up what batches measure, over all workers."""

    def __init__(self) -> None:
        """Starts empty."""
        self._sums: dict[str, Tensor] = {}

    def add(self, sums: Sums) -> None:
        """Adds one batch."""
        for name, values in sums.items():
            self._sums[name] = self._sums[name] + values if name in self._sums else values.clone()

    def total(self) -> dict[str, Tensor]:
        """The sums over all workers since the last call. Collective."""
        names = sorted(self._sums)
        flat = torch.cat([self._sums[name].double() for name in names])
        dist.all_reduce(flat)
        parts = flat.cpu().split([len(self._sums[name]) for name in names])
        self._sums.clear()
        return dict(zip(names, parts, strict=True))


class Loop:
    """One run."""

    def __init__(
        self,
        objective: Objective,
        data: TrainingData,
        settings: LoopSettings,
        keeper: Keeper,
        device: torch.device,
    ) -> None:
        """Puts the objective under DeepSpeed. Collective.

        Args:
            objective: What is optimised; all workers made the same one.
            data: Its batches.
            settings: How.
            keeper: Where checkpoints and metrics go.
            device: Where batches go.
        """
        self.engine = ZeroEngine(objective, settings)
        self._objective = objective
        self._data = data
        self._settings = settings
        self._keeper = keeper
        self._device = device
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._meter = Meter()
        self._logged = time.monotonic(), 0

    def run(self) -> dict[str, Tensor]:
        """Trains to the last step, from the newest checkpoint if there is one; returns what the objective exports.

        Raises:
            TrainingError: The checkpoint was written by another number of workers.
        """
        settings = self._settings
        start = self._resume()
        if start == 0 and settings.evaluate_every:
            self._report(0, self._held_out())
        self._logged = time.monotonic(), start
        for step in range(start, settings.steps):
            self.step(step)
            done = step + 1
            last, saves = done == settings.steps, _is_due(done, settings.checkpoint_every)
            # Before a checkpoint all is told, or a run that goes on from there would not know it.
            if last or saves or _is_due(done, settings.log_every):
                self._log(done, evaluate=last or _is_due(done, settings.evaluate_every))
            if saves and not last:
                self._keeper.keep(done, lambda folder: self.engine.save(folder, done))  # noqa: B023
        if self._rank == 0:
            self._keeper.finished()
        return self._objective.export(self.engine.parameter)

    def step(self, step: int) -> None:
        """One update, number ``step``."""
        # Dropout depends on the step, not on what has run before it.
        torch.manual_seed(hash((self._settings.seed, step, self._rank)))
        batches = self._data.training(step, self._rank, self._world)
        scales = self.scales(batches)
        for batch in batches:
            loss, sums = self.engine(batch.to(self._device), scales)
            self.engine.backward(loss)
            self.engine.update()
            self._meter.add(sums)

    def scales(self, batches: list[Batch]) -> tuple[float, ...]:
        """What the objective's sums weigh in a step of which these are this worker's batches. Collective."""
        counts = torch.tensor([self._objective.counts(batch) for batch in batches], device=self._device).sum(0)
        dist.all_reduce(counts)
        return tuple(len(batches) * self._world / max(1, count) for count in counts.tolist())

    def _log(self, done: int, evaluate: bool) -> None:
        metrics = self._objective.metrics(self._meter.total())
        since, before = self._logged
        metrics |= {
            "learning_rate": self.engine.learning_rate,
            "gradient_norm": self.engine.gradient_norm,
            "seconds_per_step": (time.monotonic() - since) / (done - before),
        }
        self._report(done, metrics | (self._held_out() if evaluate else {}))
        self._logged = time.monotonic(), done

    def _held_out(self) -> dict[str, float]:
        return {f"held_out/{name}": value for name, value in self.evaluate().items()}

    def _report(self, done: int, metrics: Mapping[str, float]) -> None:
        if self._rank == 0 and metrics:
            self._keeper.report(done, metrics)

    def evaluate(self) -> dict[str, float]:
        """Metrics over the held-out rows; empty without any. Collective."""
        batches = self._data.held_out(self._rank, self._world)
        if not batches:
            return {}
        meter = Meter()
        with self.engine.evaluating():
            for batch in batches:
                nothing = (0.0,) * len(self._objective.counts(batch))
                meter.add(self.engine(batch.to(self._device), nothing)[1])
        return self._objective.metrics(meter.total())

    def _resume(self) -> int:
        with self._keeper.latest() as folder:
            step = 0 if folder is None else self.engine.load(folder)
        if self._rank == 0:
            self._keeper.resumed(step)
        return step


def _is_due(done: int, every: int) -> bool:
    return bool(every) and done % every == 0
