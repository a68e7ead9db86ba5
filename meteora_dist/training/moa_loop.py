"""A single process that trains the MoA objective: mixed-domain steps, AdamW, one line of JSON a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from meteora_dist.config import StrictModel
from meteora_dist.training.moa_data import DomainData
from meteora_dist.training.moa_evaluation import HeldOut
from meteora_dist.training.moa_objective import MoaObjective, MoaSums

Report = Callable[[dict[str, object]], None]
"""Takes one line of the run's log."""


class MoaRun(StrictModel):
    """How the objective is optimised.

    Attributes:
        steps: Updates in all.
        rows: Rows of every domain in a step.
        micro_batch: Sequences in one pass; a step of more takes several.
        router_rate: Peak of AdamW's rate for routers; cosine to 0 after the warm-up.
        lora_rate: The same for LoRAs.
        warm_up: Share of the steps with a rising rate.
        clip: Largest norm of the gradient of routers, and of LoRAs.
        seed: Of the order of rows.
        evaluated: Held-out rows of each domain, looked at before and after; 0 for none.
    """

    steps: PositiveInt = 200
    rows: PositiveInt = 1
    micro_batch: PositiveInt = 8
    router_rate: PositiveFloat = 5e-3
    lora_rate: PositiveFloat = 1e-4
    warm_up: Annotated[float, Field(ge=0, le=1)] = 0.05
    clip: PositiveFloat = 1.0
    seed: int = 0
    evaluated: Annotated[int, Field(ge=0)] = 0


def fit(objective: MoaObjective, data: DomainData, names: Sequence[str], run: MoaRun, report: Report) -> None:
    """Trains ``objective`` in place.

    Args:
        objective: What is trained.
        data: Its rows.
        names: Of all experts, in order.
        run: How.
        report: Gets a line with ``event`` ``step`` after every step, and ``evaluation`` before and after all of them.
    """
    held_out = _held_out(objective, data, names, run)
    if held_out is not None:
        report({"event": "evaluation", "when": "before", **held_out.scores().as_json()})
    started = time.monotonic()
    groups = [(objective.router_parameters(), run.router_rate), (objective.lora_parameters(), run.lora_rate)]
    groups = [(parameters, rate) for parameters, rate in groups if parameters]
    optimizer = torch.optim.AdamW([{"params": parameters, "lr": rate} for parameters, rate in groups], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(run))
    for number in range(run.steps):
        sums = _backward(objective, data, number, run)
        for parameters, _ in groups:
            nn.utils.clip_grad_norm_(parameters, run.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        report(
            {
                "event": "step",
                "step": number + 1,
                "rates": schedule.get_last_lr(),
                "seconds": round(time.monotonic() - started, 2),
                **step_metrics(sums, names, objective.settings.eta),
            }
        )
        schedule.step()
    if held_out is not None:
        report({"event": "evaluation", "when": "after", **held_out.scores().as_json()})


def step_metrics(sums: Sequence[MoaSums], names: Sequence[str], eta: float) -> dict[str, object]:
    """Loss, its terms and the routers' accuracy, over all sequences of a step and for each domain."""
    experts = torch.tensor([expert for part in sums for expert in part.experts])
    lm_B, tokens_B, router_B = (
        torch.cat([getattr(part, field).detach().cpu() for part in sums]) for field in ("lm_B", "tokens_B", "router_B")
    )
    right_B = torch.cat([part.right_DB.float().mean(0).cpu() for part in sums])

    def of(kept_B: torch.Tensor) -> dict[str, float]:
        lm = float(lm_B[kept_B].sum() / tokens_B[kept_B].sum().clamp_min(1))
        return {
            "lm": lm,
            "router": float(router_B[kept_B].mean()),
            "router_accuracy": float(right_B[kept_B].mean()),
        }

    whole = of(torch.ones_like(experts, dtype=torch.bool))
    domains = {names[expert]: of(experts == expert) for expert in experts.unique().tolist()}
    return {"loss": whole["lm"] + eta * whole["router"], **whole, "domains": domains}


def _backward(objective: MoaObjective, data: DomainData, number: int, run: MoaRun) -> list[MoaSums]:
    """Gradients of one step: the mean over all its answer tokens, and the mean over all its sequences."""
    rows = data.step(number, run.rows, run.seed)
    device = objective.rows_DAH.device
    trained = set(objective.trained) if objective.settings.train_loras else set()
    tokens = sum(len(row.answer_ids) for row in rows if row.expert in trained)
    sums = []
    for batch in data.batches(rows, run.micro_batch):
        part = objective(batch.to(device))
        loss = objective.settings.eta * part.router_B.sum() / len(rows)
        (loss + part.lm_B.sum() / max(tokens, 1)).backward()
        sums.append(part)
    return sums


def _held_out(objective: MoaObjective, data: DomainData, names: Sequence[str], run: MoaRun) -> HeldOut | None:
    rows = {expert: own[: run.evaluated] for expert, own in data.held_out.items()}
    if not any(rows.values()):
        return None
    device = objective.rows_DAH.device
    batches = data.batches([row for own in rows.values() for row in own], run.micro_batch)
    present = {expert: names[expert] for expert, own in rows.items() if own}
    return HeldOut(objective, [batch.to(device) for batch in batches], present)


def _cosine(run: MoaRun) -> Callable[[int], float]:
    warm_steps = max(1, round(run.warm_up * run.steps))

    def factor(step: int) -> float:
        return min((step + 1) / warm_steps, 0.5 * (1 + math.cos(math.pi * min(step / run.steps, 1.0))))

    return factor
