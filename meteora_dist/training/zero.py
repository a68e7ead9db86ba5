"""DeepSpeed, as far as training uses it: an objective's parameters, gradients and optimizer, sharded by ZeRO.

Trained parameters are fp32 and the base model may be bfloat16, so DeepSpeed's own mixed precision stays off.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from meteora_dist.errors import TrainingError
from meteora_dist.training.data import Batch
from meteora_dist.training.objective import Objective, Sums
from meteora_dist.training.settings import LoopSettings

_TAG = "state"


def load_deepspeed() -> Any:
    """DeepSpeed, imported so that it compiles nothing.

    On a CPU it would compile an operator that only inference uses, behind a lock that a killed process leaves for good.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Launchers of several workers set it, and DeepSpeed insists on it.
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def zero_config(settings: LoopSettings, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a run."""
    return {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation,
        "train_batch_size": settings.micro_batch * settings.accumulation * world,
        "gradient_clipping": settings.clip,
        # Small parameters, which gates are, would stay whole on every worker.
        "zero_optimization": {"stage": settings.zero_stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


def shard_base(model: nn.Module, settings: LoopSettings, device: torch.device) -> None:
    """Under stage 3, leaves each worker of a world its share of a model that lies whole in host memory; on ``device``.

    In the other stages the whole model goes there. Collective.
    """
    if settings.zero_stage == 3:
        deepspeed = load_deepspeed()
        # Until then it takes this process for the only one.
        deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        deepspeed.zero.Init(module=model, config_dict_or_path=zero_config(settings, dist.get_world_size()))
    model.to(device)


class ZeroEngine:
    """An objective under DeepSpeed. Every method is collective."""

    def __init__(self, objective: Objective, settings: LoopSettings) -> None:
        """Joins the default process group, which must be there."""
        self._deepspeed = load_deepspeed()
        self._world = dist.get_world_size()
        groups = [
            {"params": group.parameters, "lr": group.learning_rate or settings.learning_rate}
            for group in objective.parameter_groups()
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        factor = cosine(settings.steps, settings.warm_up)
        objective.train()
        self._engine, *_ = self._deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            lr_scheduler=lambda inner: LambdaLR(inner, factor),
            config=zero_config(settings, self._world),
        )

    def __call__(self, batch: Batch, scales: Sequence[float]) -> tuple[Tensor, Sums]:
        """Passes a batch; see ``Objective.forward``."""
        result: tuple[Tensor, Sums] = self._engine(batch, scales)
        return result

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one batch, whose loss is a scalar."""
        self._engine.backward(loss)

    def update(self) -> None:
        """After each backward pass: the update, once it was the last one of a step."""
        self._engine.step()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Without gradients and dropout inside."""
        self._engine.eval()
        with torch.no_grad():
            yield
        self._engine.train()

    def parameter(self, parameter: nn.Parameter) -> Tensor:
        """The whole of a trained parameter, fp32."""
        value: Tensor = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
        return value

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The whole gradient of a trained parameter, between the last backward pass of a step and its update."""
        value: Tensor = self._deepspeed.utils.safe_get_full_grad(parameter)
        return value

    @property
    def learning_rate(self) -> float:
        """Of the first group of parameters, in the next update."""
        return float(self._engine.get_lr()[0])

    @property
    def gradient_norm(self) -> float:
        """Of the last update, before clipping."""
        return float(self._engine.get_global_grad_norm() or 0.0)

    def save(self, folder: Path, step: int) -> None:
        """Writes this worker's share of a checkpoint: trained parameters, optimizer and schedule, nothing frozen."""
        self._engine.save_checkpoint(str(folder), _TAG, {"step": step}, exclude_frozen_parameters=True)

    def load(self, folder: Path) -> int:
        """Goes on from a checkpoint; returns the number of updates it was saved after.

        Raises:
            TrainingError: It was written by another number of workers.
        """
        shares = len(list((folder / _TAG).glob("*optim_states.pt")))
        if shares != self._world:
            raise TrainingError(
                f"{folder} was written by {shares} workers, and as many must go on from it, not {self._world}"
            )
        _, state = self._engine.load_checkpoint(str(folder), _TAG, load_module_strict=False)
        return int(state["step"])


def cosine(steps: int, warm_up: float) -> Callable[[int], float]:
    """The factor of the learning rate by number of updates: linear up to 1 over ``warm_up * steps``, cosine to 0."""
    warm_steps = max(1, round(warm_up * steps))

    def factor(step: int) -> float:
        return min((step + 1) / warm_steps, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0))))

    return factor
