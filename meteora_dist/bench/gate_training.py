"""Gate training against its readable twin, the loop over experts that MeteoRA's authors train with."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from meteora_dist.bank import Bank
from meteora_dist.bench.synthetic import write_synthetic_bank
from meteora_dist.model.load import load_base
from meteora_dist.training.data import Batch
from meteora_dist.training.gate_objective import GateObjective
from meteora_dist.training.reference import LoopModel
from meteora_dist.training.settings import GateSettings

BETA = 50.0


@dataclass(frozen=True, slots=True)
class GateTrainingPlan:
    """What is measured: steps of ``sequences`` times ``length`` tokens, ``repeats`` of each way, in turn.

    Attributes:
        model: Base model.
        experts: Random ones.
        rank: R of each.
        top_k: Experts of a token.
        sequences: Of a step.
        length: Tokens of a sequence.
        repeats: Steps of each way, after one to warm up.
        dtype: Of base model and experts.
    """

    model: Path
    experts: int = 28
    rank: int = 8
    top_k: int = 2
    sequences: int = 4
    length: int = 64
    repeats: int = 5
    dtype: torch.dtype = torch.bfloat16

    @property
    def rounds(self) -> int:
        """Steps in all."""
        return len(WAYS) * (self.repeats + 1)


WAYS = ("loop over experts", "end-to-end", "local")


@dataclass(frozen=True, slots=True)
class GateTrainingRow:
    """One way; medians. ``of_loop`` is its speed over that of the loop over experts."""

    way: str
    tokens_per_s: float
    of_loop: float


def measure_gate_training(plan: GateTrainingPlan, advance: Callable[[], None]) -> list[GateTrainingRow]:
    """Measures forward pass, backward pass and update of every way on the same batch, interleaved.

    torch's own AdamW makes the updates, in this process: what DeepSpeed adds is the same for all.
    """
    with TemporaryDirectory() as folder:
        bank = write_synthetic_bank(Path(folder) / "bank", plan.model, plan.experts, plan.rank)
        steps = dict(zip(WAYS, _ways(plan, bank), strict=True))
    samples: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(plan.repeats + 1):
        for way in WAYS:
            started = time.perf_counter()
            steps[way]()
            if repeat:
                samples[way].append(time.perf_counter() - started)
            advance()
    seconds = {way: statistics.median(values) for way, values in samples.items()}
    tokens = plan.sequences * plan.length
    return [GateTrainingRow(way, tokens / seconds[way], seconds[WAYS[0]] / seconds[way]) for way in WAYS]


def _ways(plan: GateTrainingPlan, bank: Bank) -> list[Callable[[], None]]:
    batch = _batch(plan)
    twin = LoopModel(load_base(plan.model, plan.dtype), bank, plan.top_k, plan.dtype)
    found = [_step([linear.gate_EH for linear in twin.linears.values()], lambda: twin(batch, BETA))]
    for settings in (
        GateSettings(top_k=plan.top_k, beta=BETA),
        GateSettings(top_k=plan.top_k, objective="local", lm=False),
    ):
        objective = GateObjective(load_base(plan.model, plan.dtype), bank, plan.experts, settings, plan.dtype)
        found.append(_step(list(objective.parameters()), _loss_of(objective, batch)))
    return found


def _loss_of(objective: GateObjective, batch: Batch) -> Callable[[], Tensor]:
    return lambda: objective(batch, (1 / batch.counted,))[0]


def _step(parameters: list[nn.Parameter], loss: Callable[[], Tensor]) -> Callable[[], None]:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _batch(plan: GateTrainingPlan) -> Batch:
    """Random tokens, every sequence of another expert, all routed by the gates."""
    ids_BL = torch.randint(250, (plan.sequences, plan.length), generator=torch.Generator().manual_seed(0))
    mask_BL = torch.ones_like(ids_BL)
    experts_BL = (torch.arange(plan.sequences) % plan.experts)[:, None].expand_as(ids_BL)
    return Batch(ids_BL, mask_BL, mask_BL.bool(), experts_BL, (False,) * plan.sequences)
