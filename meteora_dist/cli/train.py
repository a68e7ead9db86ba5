"""``meteora train``: banks from adapters and data sets."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from transformers.utils import logging as transformers_logging

from meteora_dist.bank import Bank
from meteora_dist.cli.bank.make import made_bank
from meteora_dist.cli.options import AsJson
from meteora_dist.cli.train_display import following, held_out, last_metrics, line
from meteora_dist.cli.train_options import read_options
from meteora_dist.training.fleet import Fleet, run_fleet
from meteora_dist.training.gate_run import GateRequest, GateTraining
from meteora_dist.training.here import run_here
from meteora_dist.training.settings import GateSettings, Run
from meteora_dist.training.worker import train

Options = Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of docs/training.md; repeat for several.")]
OptionsFile = Annotated[Path | None, typer.Option("--config", help="YAML file of such options; --set goes first.")]
Workers = Annotated[int, typer.Option(help="Workers under Ray Train; 0: this process alone, without Ray.", min=0)]
Gpu = Annotated[bool, typer.Option("--gpu", help="Give every worker a GPU.")]
Cpus = Annotated[float, typer.Option(help="Logical CPUs of a worker.", min=0.1)]
Restarts = Annotated[int, typer.Option(help="Restarts from the newest checkpoint after a worker was lost.", min=0)]


def gates(
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    adapters: Annotated[Path, typer.Option(help="Folder with a PEFT adapter for each expert, EXPERT/.")],
    data: Annotated[Path, typer.Option(help="Folder with a data set for each expert, EXPERT.jsonl or .jsonl.gz.")],
    out: Annotated[Path, typer.Option(help="The bank to write; nothing may be there yet.")],
    run: Annotated[Path, typer.Option(help="Folder of the run; one that was begun there goes on.")],
    base_id: Annotated[str | None, typer.Option(help="Name of the base model in the bank. [its folder's]")] = None,
    expert: Annotated[list[str] | None, typer.Option(help="An expert; repeat, in the bank's order. [all]")] = None,
    bank: Annotated[Path | None, typer.Option(help="A finished bank that experts join.")] = None,
    add: Annotated[list[str] | None, typer.Option(help="An expert that joins --bank; repeat for several.")] = None,
    null_text: Annotated[Path | None, typer.Option(help="Texts of no expert: adds the null expert.")] = None,
    options: Options = None,
    config: OptionsFile = None,
    workers: Workers = 0,
    gpu: Gpu = False,
    cpus: Cpus = 1.0,
    restarts: Restarts = 3,
    as_json: AsJson = False,
) -> None:
    """Train the gates of a bank: from a base model, adapters and data sets to a finished bank.

    Example: meteora train gates --base BASE --adapters ADAPTERS --data DATA --out bank --run run --set steps=500
    """
    transformers_logging.disable_progress_bar()
    loop, settings = read_options(config, options or [], GateSettings)
    training = GateTraining(
        GateRequest(
            base=base,
            adapters=adapters,
            data=data,
            out=out,
            folder=run,
            base_id=base_id,
            experts=tuple(expert or ()),
            bank=bank,
            add=tuple(add or ()),
            unlabelled=null_text,
            loop=loop,
            gates=settings,
        )
    )
    if not training.done:
        do(training.run, Fleet(workers, gpu, cpus, restarts))
    say(training.run, training.publish(), as_json)


def do(run: Run, fleet: Fleet) -> None:
    """Lets the workers do their work, and shows how far they are; without a worker this process does it alone."""
    work = partial(train, run)
    with following(run.folder, run.loop.steps):
        if fleet.workers:
            run_fleet(work, run.folder, fleet)
        else:
            run_here(work, run.folder)


def say(run: Run, bank: Bank, as_json: bool) -> None:
    """Says what the run ended with, and what the bank has."""
    seen = held_out(last_metrics(run.folder))
    if as_json:
        typer.echo(json.dumps({**made_bank(bank), "held_out": seen}))
        return
    console = Console()
    if said := line(seen):
        console.print(f"held-out rows: {said}", highlight=False, soft_wrap=True)
    has = f"{len(bank.names)} experts, {len(bank.linears)} gates"
    has += f", {len(bank.router_layers)} routers" if bank.manifest.routers else ""
    console.print(f"{bank.path}: {has}", highlight=False, soft_wrap=True)
