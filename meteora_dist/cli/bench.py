"""``meteora bench``: how fast ranks are together, and how much they hold."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers.utils import logging as transformers_logging

from meteora_dist.bank import Bank
from meteora_dist.bench.capacity import CapacityPlan, CapacityRow, LimitRow, measure_capacity, measure_limit
from meteora_dist.bench.scaling import ScalingPlan, measure_scaling
from meteora_dist.engine.mesh import Mesh
from meteora_dist.model.demo_model import demo_model_dir
from meteora_dist.planning.sizes import show_bytes


def scaling(
    model: Annotated[Path | None, typer.Option(help="Base model folder; the demo's without it.")] = None,
    bank: Annotated[Path, typer.Option(help="Bank folder.")] = Path("examples/bank"),
    requests: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens each request produces.")] = 32,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.")] = 3,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Measure two expert-parallel ranks of one thread against one rank of two threads, interleaved in one run.

    Example: meteora bench scaling --requests 16 --json scaling.json
    """
    transformers_logging.disable_progress_bar()
    base = model or demo_model_dir()
    # Ranks are processes of their own, where a mistake would be a traceback.
    Bank.open(bank, hashing=False).check_base(base)
    plan = ScalingPlan(base, bank, requests, tokens, repeats)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=plan.rounds)
        rows = measure_scaling(plan, lambda: progress.advance(task))
    table = Table("ep", "threads a rank", "requests", "tokens/s", "of one rank", "time in exchanges")
    for row in rows:
        ratio, share = row.tokens_per_s / rows[0].tokens_per_s, f"{row.exchange_share:.0%}"
        table.add_row(
            str(row.ep), str(row.threads), str(row.requests), f"{row.tokens_per_s:.1f}", f"{ratio:.2f}", share
        )
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def capacity(
    model: Annotated[Path | None, typer.Option(help="Base model folder; the demo's without it.")] = None,
    experts: Annotated[
        list[int] | None, typer.Option(help="Experts in a bank, 0: none; repeat for several. [64]")
    ] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank of each.")] = 8,
    mesh: Annotated[list[str] | None, typer.Option(help="Layout as EPxTP; repeat for several. [1x1, 2x1]")] = None,
    limit_experts: Annotated[int, typer.Option(help="Experts in the bank that one rank may not hold; 0: none.")] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Measure what ranks hold: bank bytes against an even share, and peak memory while loading. Linux only.

    Banks are random, bfloat16, written to the temporary folder; experts share a few weight files by hard links there,
    and nothing in memory. Then a bank is given to one rank and to two, under a limit on memory that only two can keep.

    Example: meteora bench capacity --experts 64 --experts 1024 --mesh 2x1 --json capacity.json
    """
    transformers_logging.disable_progress_bar()
    meshes = tuple(_mesh(text) for text in mesh or ["1x1", "2x1"])
    sizes = tuple(size for size in experts or [64] if size)
    plan = CapacityPlan(model or demo_model_dir(), sizes, rank, meshes)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=len(plan.experts) * len(meshes) + 3 * bool(limit_experts))
        rows = measure_capacity(plan, lambda: progress.advance(task))
        # Tokens are compared there, and only fp32 gives the same ones on every mesh.
        exact = replace(plan, dtype="float32")
        limit = None
        if limit_experts:
            limit, served = measure_limit(exact, limit_experts, lambda: progress.advance(task))
            rows += served
    Console().print(_capacity_table(rows))
    if limit is not None:
        Console().print(_limit_text(limit), highlight=False)
    if json_file is not None:
        found = [{"measure": "capacity", **asdict(row)} for row in rows]
        found += [] if limit is None else [{"measure": "limit", **asdict(limit)}]
        json_file.write_text(json.dumps(found, indent=1) + "\n")


def _mesh(text: str) -> Mesh:
    match = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no layout; write ep and tp like 2x1", param_hint="--mesh")
    return Mesh(int(match[1]), int(match[2]))


def _capacity_table(rows: list[CapacityRow]) -> Table:
    columns = ("experts", "ep", "tp", "dtype", "bank", "of even share", "gates", "base", "peak", "of shard", "load s")
    table = Table(*columns, title="The fullest rank")
    for row in rows:
        table.add_row(
            *(str(row.experts), str(row.ep), str(row.tp), row.dtype),
            *(show_bytes(row.bank), f"{row.bank_of_even_share:.3f}", show_bytes(row.gates), show_bytes(row.base)),
            *(show_bytes(row.peak), f"{row.peak_of_shard:.3f}", f"{row.load_s:.1f}"),
        )
    return table


def _limit_text(row: LimitRow) -> str:
    same = "the same tokens as one rank without a limit" if row.same_tokens else "other tokens than without a limit"
    return (
        f"{row.experts} experts, {show_bytes(row.limit)} a rank: one rank: {row.one_rank}; two ranks: {row.two_ranks}, "
        + same
    )
