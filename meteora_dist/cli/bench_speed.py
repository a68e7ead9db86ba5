"""``meteora bench decode`` and ``prefill``: how fast one rank is in every routing mode."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast, get_args

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils import logging as transformers_logging

from meteora_dist.bench.decode import DecodePlan, DecodeRow, measure_decode
from meteora_dist.bench.modes import banks_of
from meteora_dist.bench.prefill import PrefillPlan, PrefillRow, measure_prefill
from meteora_dist.engine.config import EngineConfig
from meteora_dist.model.demo_model import demo_model_dir
from meteora_dist.model.load import Dtype
from meteora_dist.planning.sizes import show_bytes

Model = Annotated[Path | None, typer.Option(help="Base model folder; the demo's without it.")]
BankFolder = Annotated[Path, typer.Option(help="Bank folder.")]
Experts = Annotated[
    list[int] | None, typer.Option(help="Instead of --bank: experts of a random one; repeat for several.")
]
Rank = Annotated[int, typer.Option(help="LoRA rank of random experts.")]
Repeats = Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")]
Threads = Annotated[int, typer.Option(help="Torch threads.")]
Precision = Annotated[str, typer.Option(help="float32 or bfloat16.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")]
_DEMO_BANK = Path("examples/bank")


def decode(
    model: Model = None,
    bank: BankFolder = _DEMO_BANK,
    experts: Experts = None,
    rank: Rank = 8,
    batch: Annotated[list[int] | None, typer.Option(help="Requests at once; repeat for several. [8]")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens each request produces.")] = 48,
    repeats: Repeats = 5,
    threads: Threads = 1,
    dtype: Precision = "float32",
    json_file: JsonFile = None,
) -> None:
    """Measure decoding on one rank: base, named experts and auto, interleaved in one run. Linux only.

    Example: meteora bench decode --experts 8 --experts 28 --batch 1 --batch 8 --json decode.json
    """
    plan = DecodePlan(tuple(batch or [8]), tokens, repeats)
    base = model or demo_model_dir()
    rows: list[DecodeRow] = []
    transformers_logging.disable_progress_bar()
    with banks_of(base, bank, experts or (), rank) as banks, _progress() as progress:
        task = progress.add_task("measuring", total=plan.rounds * len(banks))
        for folder in banks:
            config = EngineConfig(model=base, bank=folder, threads=threads, dtype=_dtype(dtype))
            rows += asyncio.run(measure_decode(config, plan, lambda: progress.advance(task)))
    table = Table("mode", "batch", "experts", "tokens/s", "of base", "peak memory")
    for row in rows:
        speeds = f"{row.tokens_per_s:.1f}", f"{row.of_base:.2f}", show_bytes(row.peak_bytes)
        table.add_row(row.mode, str(row.batch), str(row.experts), *speeds)
    _report(table, rows, json_file)


def prefill(
    model: Model = None,
    bank: BankFolder = _DEMO_BANK,
    experts: Experts = None,
    rank: Rank = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    repeats: Repeats = 5,
    threads: Threads = 1,
    dtype: Precision = "float32",
    json_file: JsonFile = None,
) -> None:
    """Measure on one rank how long a prompt takes to its first token: base, one named expert and auto, interleaved.

    Example: meteora bench prefill --tokens 512 --json prefill.json
    """
    plan = PrefillPlan(tokens, repeats)
    base = model or demo_model_dir()
    rows: list[PrefillRow] = []
    transformers_logging.disable_progress_bar()
    with banks_of(base, bank, experts or (), rank) as banks, _progress() as progress:
        task = progress.add_task("measuring", total=plan.rounds * len(banks))
        for folder in banks:
            config = EngineConfig(
                model=base, bank=folder, threads=threads, dtype=_dtype(dtype), max_model_len=max(2048, tokens + 1)
            )
            rows += asyncio.run(measure_prefill(config, plan, lambda: progress.advance(task)))
    table = Table("mode", "tokens", "experts", "seconds", "of base's speed")
    for row in rows:
        table.add_row(row.mode, str(row.tokens), str(row.experts), f"{row.seconds:.3f}", f"{row.of_base:.2f}")
    _report(table, rows, json_file)


def _dtype(name: str) -> Dtype:
    if name not in get_args(Dtype):
        raise typer.BadParameter(f"{name!r} is no dtype; it is {' or '.join(get_args(Dtype))}", param_hint="--dtype")
    return cast(Dtype, name)


def _progress() -> Progress:
    return Progress(console=Console(stderr=True), transient=True)


def _report(table: Table, rows: Sequence[DecodeRow | PrefillRow], json_file: Path | None) -> None:
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
