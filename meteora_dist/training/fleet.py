"""The workers of a run under Ray Train: any number, restarted from the newest checkpoint when one is lost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.metrics import Gauge

from meteora_cluster.local import local_ray
from meteora_dist.errors import MeteoraError, TrainingError
from meteora_dist.training.here import Work
from meteora_dist.training.keeper import MetricsWriter

_KEPT = 2
_COLLECTIVE_TIMEOUT_S = 1800
_SPARE_CPUS = 1


@dataclass(frozen=True, slots=True)
class Fleet:
    """The workers of a run.

    Attributes:
        workers: How many.
        gpu: Whether each has a GPU, and they speak NCCL; otherwise they have CPUs and speak gloo.
        cpus: Logical CPUs that Ray reserves for each.
        restarts: How often all of them are started again after one was lost.
    """

    workers: int = 1
    gpu: bool = False
    cpus: float = 1.0
    restarts: int = 3


def run_fleet(work: Work, folder: Path, fleet: Fleet) -> None:
    """Does the work on every worker, in one process group.

    It joins the Ray cluster that ``RAY_ADDRESS`` names, as a RayJob sets it; without one it starts a Ray of its own.

    Args:
        work: What each worker does.
        folder: Of the run, the same one for all: metrics and checkpoints go there.
        fleet: The workers.

    Raises:
        MeteoraError: What ended a worker, if it is one of ours.
        TrainingError: Workers were lost more often than ``fleet.restarts`` allows.
    """
    # A report waits until the controller looks, every two seconds by default.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    with _cluster(fleet):
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"work": work, "folder": folder},
            torch_config=TorchConfig(backend="nccl" if fleet.gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
            scaling_config=ScalingConfig(
                num_workers=fleet.workers, use_gpu=fleet.gpu, resources_per_worker=_resources(fleet)
            ),
            run_config=RunConfig(  # type: ignore[call-arg]  # the class is that of Ray Train 2, its annotation of 1
                name="ray",
                storage_path=str(folder.resolve()),
                failure_config=FailureConfig(max_failures=fleet.restarts),
                checkpoint_config=CheckpointConfig(num_to_keep=_KEPT),
                worker_runtime_env={"env_vars": _environment(fleet)},
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _reason(error) from error


class RayKeeper:
    """Keeps checkpoints where Ray Train does; metrics go to the run's folder, and to Ray's for Prometheus."""

    def __init__(self, folder: Path) -> None:
        """Of one worker of the run in ``folder``."""
        self._metrics = MetricsWriter(folder)
        self._gauges: dict[str, Gauge] = {}

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        """See ``Keeper``."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def keep(self, step: int, save: Callable[[Path], None]) -> None:
        """See ``Keeper``: Ray joins what the workers write, and counts a checkpoint when it has all of it."""
        with tempfile.TemporaryDirectory() as folder:
            save(Path(folder))
            ray.train.report({"step": step}, Checkpoint.from_directory(folder), checkpoint_dir_name=f"step_{step:08d}")

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Keeper``."""
        self._metrics.write(step, metrics)
        for name, value in {"step": float(step), **metrics}.items():
            gauge, tags = prometheus_name(name)
            if gauge not in self._gauges:
                self._gauges[gauge] = Gauge(gauge, "Of the training run under way.", tag_keys=("rows", "part"))
            self._gauges[gauge].set(value, tags=tags)

    def resumed(self, step: int) -> None:
        """See ``Keeper``."""
        self._metrics.resumed(step)

    def finished(self) -> None:
        """See ``Keeper``."""
        self._metrics.close()


def prometheus_name(metric: str) -> tuple[str, dict[str, str]]:
    """Name and labels of a metric: ``held_out/gate_ce/layer/3`` is a part of ``meteora_train_gate_ce``.

    Labels: ``rows``, training or held_out; ``part``, such as ``layer/3``, or all.
    """
    rest = metric.removeprefix("held_out/")
    kind, _, part = rest.partition("/")
    return f"meteora_train_{kind}", {"rows": "training" if rest == metric else "held_out", "part": part or "all"}


def _worker(config: dict[str, Any]) -> None:
    # Workers of one machine see all of its GPUs; this one's is then what "cuda" means.
    if (device := get_device()).type == "cuda":
        torch.cuda.set_device(device)
    config["work"](RayKeeper(config["folder"]))


def _cluster(fleet: Fleet) -> AbstractContextManager[None]:
    if ray.is_initialized():
        return nullcontext()
    if "RAY_ADDRESS" in os.environ:
        return _joined()
    return local_ray(cpus=fleet.cpus * fleet.workers + _SPARE_CPUS, gpus=fleet.workers * fleet.gpu)


@contextmanager
def _joined() -> Iterator[None]:
    ray.init(log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def _resources(fleet: Fleet) -> dict[str, float]:
    return {"CPU": fleet.cpus, "GPU": 1} if fleet.gpu else {"CPU": fleet.cpus}


def _environment(fleet: Fleet) -> dict[str, str]:
    found = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return found if fleet.gpu else {**found, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, int(fleet.cpus)))}


def _reason(error: TrainingFailedError) -> MeteoraError:
    """Our own error that ended a worker, or what Ray says of it."""
    failures = getattr(error, "worker_failures", {}).values()
    for failure in failures:
        cause = failure
        while cause is not None:
            if isinstance(cause, MeteoraError):
                return cause
            cause = cause.__cause__
    return TrainingError(f"the workers failed: {error}")
