"""``meteora report routing``: how a bank routes data sets, as a page or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from transformers.utils import logging as transformers_logging

from meteora_dist.bank import Bank
from meteora_dist.cli.progress import progress_bar
from meteora_dist.errors import MeteoraError
from meteora_dist.evaluation.prompts import open_tokenizer
from meteora_dist.evaluation.routing import routing_summary
from meteora_dist.evaluation.routing_page import routing_page
from meteora_dist.evaluation.suite import load_suite
from meteora_dist.model.demo_model import demo_model_dir
from meteora_dist.model.load import load_base, torch_dtype
from meteora_dist.moe.inject import inject
from meteora_dist.moe.routing import RoutingChoice


def routing(
    out: Annotated[Path, typer.Option(help="The page to write, one HTML file that loads nothing.")] = Path(
        "routing.html"
    ),
    model: Annotated[Path | None, typer.Option(help="Base model folder. [the demo's]")] = None,
    bank: Annotated[Path, typer.Option(help="Bank folder.")] = Path("examples/bank"),
    data: Annotated[list[Path] | None, typer.Option(help="Task file or folder; repeat. [examples/data]")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Task, by its file's name; repeat, in order. [all]")] = None,
    rows: Annotated[int, typer.Option(help="Most rows of a task, held-out ones.", min=1)] = 8,
    top_k: Annotated[int | None, typer.Option("--topk", help="Experts a token uses. [the bank's]", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, and write no page.")] = False,
) -> None:
    """Pass over data sets and draw what the gates choose: by task, layer and token, and how surely.

    Task files are those of `meteora eval`; a task need not have an expert of its name.

    Example: meteora report routing --bank examples/bank --data examples/data --rows 4 --out routing.html
    """
    transformers_logging.disable_progress_bar()
    base, opened = model or demo_model_dir(), Bank.open(bank)
    tasks = load_suite(data or [Path("examples/data")], task or (), rows)
    tokenizer = open_tokenizer(base)
    used = top_k or opened.manifest.routing.top_k
    with progress_bar() as progress:
        bar = progress.add_task("loading", total=sum(len(one.rows) for one in tasks))
        dtype = torch_dtype("float32")
        routed = inject(load_base(base, dtype), opened, dtype)
        progress.update(bar, description="passing")
        choice = RoutingChoice(top_k=min(used, len(opened.names)))
        found = routing_summary(routed, tokenizer, opened.names, tasks, choice, lambda: progress.advance(bar))
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    setting = f"Bank {bank}, model {base.name}, {sum(one.rows for one in found.tasks)} rows, routed auto, top {used}."
    try:
        out.write_text(routing_page(f"How {bank.name} routes", found, setting), encoding="utf-8")
    except OSError as cause:
        raise MeteoraError(f"{out} cannot be written: {cause.strerror}") from cause
    for one in found.tasks:
        first = max(range(len(found.experts)), key=lambda number: one.chosen[number])
        typer.echo(f"{one.task}: {found.experts[first]} {one.chosen[first]:.0%}")
    typer.echo(str(out))
