"""Workers under Ray Train: what they learn together, what ends them, and what a killed one costs."""

from __future__ import annotations

import os
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from meteora_dist.bank import Bank
from meteora_dist.errors import TrainingError
from meteora_dist.training.fleet import Fleet, run_fleet
from meteora_dist.training.gate_run import GateTraining
from meteora_dist.training.loop import Keeper
from meteora_dist.training.moa_run import MoaTraining
from meteora_dist.training.run_folder import TRAINED_FILE
from meteora_dist.training.settings import Run
from meteora_dist.training.worker import train
from tests.support.tasks import request
from tests.training.test_gate_run import alone, reports
from tests.training.test_moa import asked

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 60


def planned(kind: str, base: Path, bank: Bank, folder: Path, micro_batch: int) -> Run:
    options = {"steps": STEPS, "checkpoint_every": 20, "micro_batch": micro_batch, "hold_out": 0.0}
    if kind == "moa":
        return MoaTraining(asked(base, folder, options, bank=bank.path)).run
    return GateTraining(request(base, bank.path / "experts", folder, options)).run


def slow_train(run: Run, keeper: Keeper) -> None:
    """Takes its time, so that a worker can be killed between two checkpoints."""
    keeper.report = _after(keeper.report)  # type: ignore[method-assign]
    train(run, keeper)


def _after(report):
    def slowly(step, metrics) -> None:
        time.sleep(0.1)
        report(step, metrics)

    return slowly


def kill_a_worker(run: Run, killed: list[int]) -> None:
    """Kills the first worker it finds once a checkpoint is there and the next is not."""
    while not (run.folder / "ray" / "step_00000020").exists() or not any(r["step"] == 25 for r in reports(run.folder)):
        time.sleep(0.05)
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
            killed.append(process.pid)
            return


def far(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - tensor).norm() / tensor.norm()) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", ["gates", "moa"])
def test_a_killed_worker_costs_time_and_nothing_else(
    ray_home: Path, tiny_base: Path, tiny_bank: Bank, tmp_path: Path, kind: str
) -> None:
    undisturbed = planned(kind, tiny_base, tiny_bank, tmp_path / "undisturbed", micro_batch=4)
    alone(undisturbed)
    run = planned(kind, tiny_base, tiny_bank, tmp_path / "killed", micro_batch=2)
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(run, killed), daemon=True)
    killer.start()
    run_fleet(partial(slow_train, run), run.folder, Fleet(workers=2, restarts=1))
    killer.join(10)
    assert len(killed) == 1
    assert [line["step"] for line in reports(run.folder)] == list(range(1, STEPS + 1))
    expected = load_file(undisturbed.folder / TRAINED_FILE)
    assert far(load_file(run.folder / TRAINED_FILE), expected) < 1e-4


def fail(run: Run, keeper: Keeper) -> None:
    raise TrainingError(f"worker {os.environ['RANK']} will not")


def test_our_own_errors_come_through(ray_home: Path, tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    run = planned("gates", tiny_base, tiny_bank, tmp_path, micro_batch=2)
    with pytest.raises(TrainingError, match="will not"):
        run_fleet(partial(fail, run), run.folder, Fleet(workers=2, restarts=0))
