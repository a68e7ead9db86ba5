"""ZeRO against one plain torch process, checkpoints, and a run that goes on where another ended."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from meteora_dist.bank import Bank
from meteora_dist.training.gate_data import GateData
from meteora_dist.training.gate_objective import GateObjective
from meteora_dist.training.gate_run import GateTraining
from meteora_dist.training.keeper import FolderKeeper
from meteora_dist.training.settings import GateRun
from meteora_dist.training.worker import prepare
from meteora_dist.training.zero import cosine
from tests.support.ranks import run_ranks
from tests.support.tasks import request
from tests.support.tiny import load_tiny_llama

WORLD, MICRO_BATCH, ACCUMULATION, CLIP = 2, 3, 2, 0.05
STAGES = (1, 2, 3)


def planned(tiny_base: Path, tiny_bank: Bank, folder: Path, **options: object) -> GateRun:
    return GateTraining(request(tiny_base, tiny_bank.path / "experts", folder, options)).run


def gradients_and_gates(rank: int, runs: list[GateRun]) -> list[tuple[list[Tensor], list[Tensor], int]]:
    """Of each run: the gradients of its first step, the gates after it, and how many numbers this rank holds."""
    found = []
    for run in runs:
        loop = prepare(run, FolderKeeper(run.folder))
        engine, (gates,) = loop.engine, loop._objective.parameter_groups()
        batches = loop._data.training(0, rank, WORLD)
        scales = loop.scales(batches)
        for batch in batches:
            loss, _ = engine(batch, scales)
            engine.backward(loss)
            if batch is batches[-1]:
                gradients = [engine.gradient(gate).clone() for gate in gates.parameters]
            engine.update()
        held = sum(getattr(p, "ds_tensor", p).numel() for p in loop._objective.parameters())
        found.append((gradients, [engine.parameter(gate).clone() for gate in gates.parameters], held))
    return found


def by_torch_alone(run: GateRun) -> tuple[list[Tensor], list[Tensor]]:
    """The same step as one process and torch's own AdamW make it, on all sequences at once."""
    bank = Bank.open(run.draft)
    objective = GateObjective(load_tiny_llama(run.base), bank, len(run.trained), run.gates, torch.float32)
    whole = run.model_copy(
        update={
            "loop": run.loop.model_copy(update={"micro_batch": WORLD * MICRO_BATCH * ACCUMULATION, "accumulation": 1})
        }
    )
    (batch,) = GateData(whole, bank.names, AutoTokenizer.from_pretrained(run.base)).training(0, 0, 1)
    (gates,) = objective.parameter_groups()
    optimizer = torch.optim.AdamW(gates.parameters, lr=run.loop.learning_rate, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["lr"] *= cosine(run.loop.steps, run.loop.warm_up)(0)
    objective(batch, (1 / batch.counted,))[0].backward()
    gradients = [gate.grad.clone() for gate in gates.parameters]
    torch.nn.utils.clip_grad_norm_(gates.parameters, CLIP)
    optimizer.step()
    return gradients, [gate.detach() for gate in gates.parameters]


def far(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference of a tensor, relative to its norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


def test_two_workers_of_any_stage_do_what_torch_alone_does(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    options = {"micro_batch": MICRO_BATCH, "accumulation": ACCUMULATION, "clip": CLIP, "hold_out": 0.0}
    runs = [planned(tiny_base, tiny_bank, tmp_path / str(stage), zero_stage=stage, **options) for stage in STAGES]
    gradients, gates = by_torch_alone(runs[0])
    ranks = run_ranks(WORLD, gradients_and_gates, runs)
    for results in ranks:
        for stage, (ours, after, _) in zip(STAGES, results, strict=True):
            assert far(ours, gradients) < 1e-5, stage
            assert far(after, gates) < 1e-5, stage
    whole = sum(parameter.numel() for parameter in load_tiny_llama(tiny_base).parameters()) + sum(
        gate.numel() for gate in gates
    )
    for index, stage in enumerate(STAGES):
        held = [results[index][2] for results in ranks]
        # Stage 3 shards the frozen base too; what does not divide by two is padded.
        assert all(count < 0.51 * whole for count in held) if stage == 3 else held == [whole, whole]
