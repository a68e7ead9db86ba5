"""``meteora train moa``: routers, and LoRAs with them, by the objective of Mixture-of-LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging as transformers_logging

from meteora_dist.cli.options import AsJson
from meteora_dist.cli.train import Cpus, Gpu, Options, OptionsFile, Restarts, Workers, do, say
from meteora_dist.cli.train_options import read_options
from meteora_dist.training.fleet import Fleet
from meteora_dist.training.moa_run import MoaRequest, MoaTraining
from meteora_dist.training.settings import MoaSettings


def command(
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    data: Annotated[Path, typer.Option(help="Folder with a data set for each expert, <expert>.jsonl or .jsonl.gz.")],
    out: Annotated[Path, typer.Option(help="The bank to write; nothing may be there yet.")],
    run: Annotated[Path, typer.Option(help="Folder of the run; one that was begun there goes on.")],
    bank: Annotated[Path | None, typer.Option(help="The bank to start from.")] = None,
    adapters: Annotated[Path | None, typer.Option(help="Or a folder with a PEFT adapter for each expert.")] = None,
    base_id: Annotated[str | None, typer.Option(help="Name of the base model, with --adapters. [its folder's]")] = None,
    train: Annotated[
        list[str] | None, typer.Option(help="Expert to train, nothing of the others: repeat for several. [all]")
    ] = None,
    options: Options = None,
    config: OptionsFile = None,
    workers: Workers = 0,
    gpu: Gpu = False,
    cpus: Cpus = 1.0,
    restarts: Restarts = 3,
    as_json: AsJson = False,
) -> None:
    """Train routers and LoRAs jointly, domains mixed in every step, and write the finished bank.

    Example: meteora train moa --base BASE --bank examples/bank --data examples/data --out moa-bank --run run
    """
    transformers_logging.disable_progress_bar()
    loop, settings = read_options(config, options or [], MoaSettings)
    training = MoaTraining(
        MoaRequest(
            base=base,
            data=data,
            out=out,
            folder=run,
            bank=bank,
            adapters=adapters,
            base_id=base_id,
            trained=tuple(train or ()),
            loop=loop,
            moa=settings,
        )
    )
    if not training.done:
        do(training.run, Fleet(workers, gpu, cpus, restarts))
    say(training.run, training.publish(), as_json)
