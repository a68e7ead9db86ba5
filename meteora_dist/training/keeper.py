"""A run's folder: metrics.jsonl, TensorBoard events, and without Ray Train its checkpoints.

metrics.jsonl          one line a report: {"step": 10, "loss": ..., ...}
tensorboard/           the same, for TensorBoard
checkpoints/step_N/    by ``FolderKeeper``; Ray Train keeps its own below ``ray/``
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from tensorboardX import SummaryWriter

METRICS_FILE = "metrics.jsonl"
_KEPT = 2


class MetricsWriter:
    """Writes metrics to the run's folder."""

    def __init__(self, folder: Path) -> None:
        """Goes on with what is in ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / METRICS_FILE
        self._events = folder / "tensorboard"
        self._writer: SummaryWriter | None = None

    def resumed(self, step: int) -> None:
        """Forgets what was reported after ``step``: those steps are made once more."""
        if self._path.exists():
            # What is reported at step 0 is reported again by a run that begins again.
            lines = [line for line in self._path.read_text().splitlines() if json.loads(line)["step"] <= step > 0]
            self._path.write_text("".join(f"{line}\n" for line in lines))
        # TensorBoard then drops what older files say of later steps; a file of the same second would be the same one.
        self._writer = SummaryWriter(str(self._events), purge_step=step + 1, filename_suffix=f".{step}")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one report."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._writer = self._writer or SummaryWriter(str(self._events))
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Waits until all is written: TensorBoard's events are written by a thread."""
        if self._writer is not None:
            self._writer.close()


class FolderKeeper:
    """Keeps the last two checkpoints in the run's folder, for workers of one machine."""

    def __init__(self, folder: Path) -> None:
        """Goes on with what is in ``folder``."""
        self._checkpoints = folder / "checkpoints"
        self._metrics = MetricsWriter(folder)

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        """See ``Keeper``."""
        kept = self._kept()
        yield kept[-1] if kept else None

    def keep(self, step: int, save: Callable[[Path], None]) -> None:
        """See ``Keeper``; a checkpoint is there when all workers have written theirs, or not at all."""
        partial, place = self._checkpoints / f"partial_{step:08d}", self._checkpoints / f"step_{step:08d}"
        partial.mkdir(parents=True, exist_ok=True)
        save(partial)
        dist.barrier()
        if dist.get_rank() == 0:
            partial.rename(place)
            for old in self._kept()[:-_KEPT]:
                shutil.rmtree(old)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """See ``Keeper``."""
        self._metrics.write(step, metrics)

    def resumed(self, step: int) -> None:
        """See ``Keeper``."""
        self._metrics.resumed(step)

    def finished(self) -> None:
        """See ``Keeper``."""
        self._metrics.close()

    def _kept(self) -> list[Path]:
        return sorted(self._checkpoints.glob("step_*"))
