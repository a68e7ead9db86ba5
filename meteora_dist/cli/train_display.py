"""What a training run shows: a bar that follows its metrics file, and a line at its end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from meteora_dist.training.keeper import METRICS_FILE

_POLL_S = 0.5


@contextmanager
def following(folder: Path, steps: int) -> Iterator[None]:
    """Shows the progress of the run in ``folder`` on stderr, wherever its workers are."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    over = threading.Event()
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=steps)

        def look() -> None:
            if metrics := last_metrics(folder):
                progress.update(task, completed=metrics["step"], description=line(metrics))

        def follow() -> None:
            while not over.wait(_POLL_S):
                look()

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            look()


def last_metrics(folder: Path) -> dict[str, float]:
    """The newest whole line of a run's metrics; empty before the first."""
    path = folder / METRICS_FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    found: dict[str, float] = json.loads(lines[-1]) if lines else {}
    return found


def line(metrics: Mapping[str, float]) -> str:
    """The metrics without their parts, in one line: ``loss 1.234 gate_ce 0.123``."""
    hidden = {"step", "learning_rate", "gradient_norm", "seconds_per_step"}
    shown = {name: value for name, value in metrics.items() if "/" not in name and name not in hidden}
    return " ".join(f"{name} {value:.4f}" for name, value in shown.items())


def held_out(metrics: Mapping[str, float]) -> dict[str, float]:
    """Those of the held-out rows; empty when none were looked at."""
    rows = "held_out/"
    return {name.removeprefix(rows): value for name, value in metrics.items() if name.startswith(rows)}
