"""``meteora bench gates``: how fast gates are trained."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils import logging as transformers_logging

from meteora_dist.bench.gate_training import GateTrainingPlan, measure_gate_training
from meteora_dist.model.demo_model import demo_model_dir
from meteora_dist.model.load import Dtype, torch_dtype


def gates(
    model: Annotated[Path | None, typer.Option(help="Base model folder; the demo's without it.")] = None,
    experts: Annotated[int, typer.Option(help="Random experts.", min=1)] = 28,
    rank: Annotated[int, typer.Option(help="LoRA rank of each.", min=1)] = 8,
    top_k: Annotated[int, typer.Option(help="Experts of a token.", min=1)] = 2,
    sequences: Annotated[int, typer.Option(help="Of a step.", min=1)] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a sequence.", min=2)] = 64,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.", min=1)] = 5,
    dtype: Annotated[Dtype, typer.Option(help="Of base model and experts.")] = "bfloat16",
    threads: Annotated[int, typer.Option(help="Torch threads.", min=1)] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Measure training steps of gates against the authors' loop over experts, interleaved in one run.

    Example: meteora bench gates --experts 28 --json gates.json
    """
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    folder = model or demo_model_dir()
    plan = GateTrainingPlan(folder, experts, rank, top_k, sequences, length, repeats, torch_dtype(dtype))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=plan.rounds)
        rows = measure_gate_training(plan, lambda: progress.advance(task))
    table = Table("training", "tokens/s", "of the loop")
    for row in rows:
        table.add_row(row.way, f"{row.tokens_per_s:.1f}", f"{row.of_loop:.2f}")
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
