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
from meteora_dist.training.gate_worker import TRAINED_FILE, train_gates
from meteora_dist.training.loop import Keeper
from meteora_dist.training.settings import GateRun
from tests.support.tasks import request
from tests.training.test_gate_run import alone, reports

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

STEPS = 60


def planned(base: Path, bank: Bank, folder: Path, micro_batch: int) -> GateRun:
    options = {"steps": STEPS, "checkpoint_every": 20, "micro_batch": micro_batch, "hold_out": 0.0}
    return GateTraining(request(base, bank.path / "experts", folder, options)).run


@pytest.fixture(scope="module")
def undisturbed(tiny_base: Path, tiny_bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What one worker makes of the same sequences."""
    run = planned(tiny_base, tiny_bank, tmp_path_factory.mktemp("undisturbed"), micro_batch=4)
    alone(run)
    return load_file(run.folder / TRAINED_FILE)


def slow_train(run: GateRun, keeper: Keeper) -> None:
    """Takes its time, so that a worker can be killed between two checkpoints."""
    keeper.report = _after(keeper.report)  # type: ignore[method-assign]
    train_gates(run, keeper)


def _after(report):
    def slowly(step, metrics) -> None:
        time.sleep(0.1)
        report(step, metrics)

    return slowly


def kill_a_worker(run: GateRun, killed: list[int]) -> None:
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


def test_a_killed_worker_costs_time_and_nothing_else(
    ray_home: Path, tiny_base: Path, tiny_bank: Bank, tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    run = planned(tiny_base, tiny_bank, tmp_path, micro_batch=2)
    killed: list[int] = []
    killer = threading.Thread(target=kill_a_worker, args=(run, killed), daemon=True)
    killer.start()
    run_fleet(partial(slow_train, run), run.folder, Fleet(workers=2, restarts=1))
    killer.join(10)
    assert len(killed) == 1
    assert [line["step"] for line in reports(run.folder)] == list(range(1, STEPS + 1))
    assert far(load_file(run.folder / TRAINED_FILE), undisturbed) < 1e-4


def fail(run: GateRun, keeper: Keeper) -> None:
    raise TrainingError(f"worker {os.environ['RANK']} will not")


def test_our_own_errors_come_through(ray_home: Path, tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    run = planned(tiny_base, tiny_bank, tmp_path, micro_batch=2)
    with pytest.raises(TrainingError, match="will not"):
        run_fleet(partial(fail, run), run.folder, Fleet(workers=2, restarts=0))
