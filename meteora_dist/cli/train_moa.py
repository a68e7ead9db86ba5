"""``meteora train moa``: routers, and LoRAs with them, by the objective of Mixture-of-LoRAs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import torch
import typer

from meteora_dist.bank import Bank
from meteora_dist.bank.manifest import Pooling
from meteora_dist.errors import InvalidRequest
from meteora_dist.model.load import Dtype
from meteora_dist.training.moa_bank import first_bank
from meteora_dist.training.moa_loop import MoaRun, Report
from meteora_dist.training.moa_objective import MoaSettings
from meteora_dist.training.moa_run import MoaJob, train_moa


def command(
    base: Annotated[Path, typer.Option(help="Base model folder.")],
    data: Annotated[Path, typer.Option(help="Folder with NAME.jsonl or NAME.jsonl.gz, the rows of every expert.")],
    out: Annotated[Path, typer.Option(help="The bank to write; nothing may be there yet.")],
    bank: Annotated[Path | None, typer.Option(help="The bank to start from.")] = None,
    adapters: Annotated[Path | None, typer.Option(help="Or a folder with one PEFT adapter an expert.")] = None,
    base_id: Annotated[str | None, typer.Option(help="Name of the base model, with --adapters. [its folder's]")] = None,
    train: Annotated[
        list[str] | None, typer.Option(help="Expert to train, nothing of the others: repeat for several. [all]")
    ] = None,
    freeze_loras: Annotated[bool, typer.Option("--freeze-loras", help="Train routers alone.")] = False,
    eta: Annotated[float, typer.Option(help="Weight of the routers' loss.", min=0)] = 1.0,
    pooling: Annotated[Pooling, typer.Option(help="What of a prompt routers read.")] = "last",
    router_input: Annotated[
        Literal["base", "expert"],
        typer.Option(help="Routers learn from the base model's states, as they vote, or from the labelled expert's."),
    ] = "base",
    steps: Annotated[int, typer.Option(help="Updates.", min=1)] = 200,
    rows: Annotated[int, typer.Option(help="Rows of every domain in a step.", min=1)] = 1,
    micro_batch: Annotated[int, typer.Option(help="Sequences in one pass.", min=1)] = 8,
    router_rate: Annotated[float, typer.Option(help="Peak learning rate of routers.")] = 5e-3,
    lora_rate: Annotated[float, typer.Option(help="Peak learning rate of LoRAs.")] = 1e-4,
    max_tokens: Annotated[int, typer.Option(help="Rows that are longer are left out.", min=2)] = 1024,
    evaluated: Annotated[int, typer.Option(help="Held-out rows of each domain to look at before and after.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Of the base model; what is trained is float32.")] = "float32",
    threads: Annotated[int, typer.Option(help="Torch threads.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the order of rows.")] = 0,
    log: Annotated[Path | None, typer.Option(help="File for the run's JSON lines. [stdout]")] = None,
) -> None:
    """Train routers and LoRAs jointly, domains mixed in every step, and write the finished bank.

    The last fifth of every file is held out. One process; the same seed, rows and threads give the same bank.

    Example: meteora train moa --base BASE --bank examples/bank --data examples/data --out moa-bank --evaluated 100
    """
    torch.set_num_threads(threads)
    settings = MoaSettings(eta=eta, pooling=pooling, router_input=router_input, train_loras=not freeze_loras)
    run = MoaRun(
        steps=steps,
        rows=rows,
        micro_batch=micro_batch,
        router_rate=router_rate,
        lora_rate=lora_rate,
        seed=seed,
        evaluated=evaluated,
    )
    job = MoaJob(base, data, out, settings, run, tuple(train or ()), max_tokens, dtype)
    with _start(base, bank, adapters, base_id) as before, _report(log) as report:
        train_moa(job, before, report)


@contextmanager
def _start(base: Path, bank: Path | None, adapters: Path | None, base_id: str | None) -> Iterator[Bank]:
    """The bank to start from."""
    if (bank is None) == (adapters is None):
        raise InvalidRequest("the run starts from --bank or from --adapters: name one of them")
    if bank is not None:
        yield Bank.open(bank)
        return
    assert adapters is not None
    with TemporaryDirectory() as folder:
        yield first_bank(Path(folder) / "bank", base, base_id or base.resolve().name, adapters)


@contextmanager
def _report(log: Path | None) -> Iterator[Report]:
    if log is None:
        yield lambda line: typer.echo(json.dumps(line))
        return
    with log.open("w", encoding="utf-8") as file:
        yield lambda line: print(json.dumps(line), file=file, flush=True)
