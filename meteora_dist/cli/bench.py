"""``meteora bench``: how fast it is on this machine."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils import logging as transformers_logging

from meteora_dist.bench.decode import DecodePlan, DecodeRow, measure_decode
from meteora_dist.engine.config import EngineConfig
from meteora_dist.model.demo_model import demo_model_dir


def decode(
    model: Annotated[Path | None, typer.Option(help="Base model folder; the demo's without it.")] = None,
    bank: Annotated[Path, typer.Option(help="Bank folder.")] = Path("examples/bank"),
    batch: Annotated[list[int] | None, typer.Option(help="Requests at once; repeat for several. [8]")] = None,
    top_k: Annotated[int, typer.Option(help="Experts a token uses under auto.")] = 2,
    tokens: Annotated[int, typer.Option(help="Tokens each request produces.")] = 48,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 5,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Measure decoding on one rank: base, one named expert and auto, interleaved in one run.

    Example: meteora bench decode --batch 1 --batch 8 --json decode.json
    """
    transformers_logging.disable_progress_bar()
    plan = DecodePlan(tuple(batch or [8]), top_k, tokens, repeats)
    config = EngineConfig(model=model or demo_model_dir(), bank=bank, threads=threads)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=plan.rounds)
        rows = asyncio.run(measure_decode(config, plan, lambda: progress.advance(task)))
    Console().print(_table(rows))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _table(rows: list[DecodeRow]) -> Table:
    table = Table("mode", "batch", "experts", "top-k", "tokens/s", "of base")
    bases = {row.batch: row.tokens_per_s for row in rows if row.mode == "base"}
    for row in rows:
        ratio = row.tokens_per_s / bases[row.batch]
        table.add_row(
            row.mode, str(row.batch), str(row.experts), str(row.top_k), f"{row.tokens_per_s:.1f}", f"{ratio:.2f}"
        )
    return table
