"""``meteora bench load`` and ``meteora bench frontend``: a service of this machine under load."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from meteora_dist.bench.frontend import FrontendPlan, FrontendRow, measure_frontend
from meteora_dist.bench.load_page import page
from meteora_dist.bench.load_report import LoadRow, first_words, report
from meteora_dist.bench.local_load import LocalLoadPlan, MemoryRow, measure_load
from meteora_dist.cli.bench_serve import load_table, say_failures
from meteora_dist.model.demo_model import demo_model_dir
from meteora_dist.planning.sizes import show_bytes
from meteora_dist.serving.app import parse_config
from meteora_dist.serving.config import ServiceConfig

MOST_GROWTH = 0.05
MOST_REJECT_MS = 200.0

_Model = Annotated[Path | None, typer.Option(help="Base model folder; the demo's without it.")]
_Bank = Annotated[Path, typer.Option(help="Bank folder.")]
_Ask = Annotated[list[str] | None, typer.Option(help="What requests name as model; repeat for several. [auto]")]
_Ep = Annotated[int, typer.Option(help="Ranks; each owns its share of the experts.", min=1)]
_Threads = Annotated[int, typer.Option(help="Torch threads of a rank.", min=1)]
_JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")]


def load(
    model: _Model = None,
    bank: _Bank = Path("examples/bank"),
    ask: _Ask = None,
    ep: _Ep = 2,
    threads: _Threads = 1,
    streams: Annotated[int, typer.Option(help="Streams at a time, which is the service's limit.", min=1)] = 64,
    knocking: Annotated[int, typer.Option(help="Callers beyond the limit, who are refused.", min=0)] = 16,
    warm_up: Annotated[float, typer.Option(help="Seconds of load before memory is compared.", min=0)] = 60.0,
    duration: Annotated[float, typer.Option(help="Seconds of load after that.", min=1)] = 60.0,
    answer_tokens: Annotated[int, typer.Option(help="Most tokens of an answer; half as many at least.", min=1)] = 32,
    json_file: _JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Also write a page of curves to this file (HTML).")] = None,
) -> None:
    """Load a local service to its limit and beyond: errors, time to refuse, growth of memory.

    Exits with 1 when a request failed otherwise than with 429, 1 % of refusals took longer than 200 ms, a part of the
    service grew by more than 5 % after the warm-up, or the warm-up was too short to tell.

    Example: meteora bench load --streams 64 --duration 60 --json load.json
    """
    plan = LocalLoadPlan(tuple(ask or ["auto"]), streams, knocking, warm_up, duration, answer_tokens=answer_tokens)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("requests", total=None)
        calls, memory = measure_load(_config(model, bank, ep, threads), plan, lambda call: progress.advance(task))
    rows = report(calls)
    Console().print(load_table(rows))
    Console().print(_memory_table(memory))
    say_failures(first_words(calls))
    if json_file is not None:
        found = [{"measure": "load", **asdict(row)} for row in rows]
        found += [{"measure": "memory", **asdict(row)} for row in memory]
        json_file.write_text(json.dumps(found, indent=1) + "\n")
    if plot is not None:
        plot.write_text(page(f"{streams} streams at a time and {knocking} callers more", calls))
    if missed := _missed(rows[0], memory, plan.warmed_up(calls)):
        Console().print(f"not reached: {'; '.join(missed)}", style="red")
        raise typer.Exit(1)


def frontend(
    model: _Model = None,
    bank: _Bank = Path("examples/bank"),
    ask: Annotated[str, typer.Option(help="What requests name as model.")] = "auto",
    streams: Annotated[int, typer.Option(help="Streams at a time.", min=1)] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 64,
    repeats: Annotated[int, typer.Option(help="Interleaved rounds; medians are reported.", min=1)] = 5,
    threads: _Threads = 1,
    json_file: _JsonFile = None,
) -> None:
    """Measure HTTP streams against the same engine asked in its own process, interleaved in one run. One rank.

    Example: meteora bench frontend --streams 8 --json frontend.json
    """
    plan = FrontendPlan(ask, streams, tokens=tokens, repeats=repeats)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=2 * (repeats + 1))
        rows = measure_frontend(_config(model, bank, 1, threads), plan, lambda: progress.advance(task))
    Console().print(_frontend_table(rows))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def _config(model: Path | None, bank: Path, ep: int, threads: int) -> ServiceConfig:
    settings = {"model": model or demo_model_dir(), "bank": bank, "ep": ep, "threads": threads, "access": "open"}
    return parse_config(settings)


def _missed(row: LoadRow, memory: Sequence[MemoryRow], warmed_up: bool) -> list[str]:
    """What the load should have shown, and did not."""
    missed = [] if warmed_up else ["a longer --warm-up is needed: not every stream had a whole answer at its end"]
    missed += [f"{count} requests failed: {kind}" for kind, count in row.errors.items()]
    if row.reject_ms.p99 is not None and row.reject_ms.p99 > MOST_REJECT_MS:
        missed.append(f"p99 of a refusal is {row.reject_ms.p99:.0f} ms, above {MOST_REJECT_MS:.0f}")
    missed += [
        f"the {one.role} grew by {one.growth:.1%}, more than {MOST_GROWTH:.0%}"
        for one in memory
        if one.growth > MOST_GROWTH
    ]
    return missed


def _memory_table(rows: Sequence[MemoryRow]) -> Table:
    table = Table("process", "how many", "after warm-up", "highest", "growth", title="Resident memory")
    for row in rows:
        sizes = (show_bytes(row.start_bytes), show_bytes(row.highest_bytes))
        table.add_row(row.role, str(row.processes), *sizes, f"{row.growth:+.1%}")
    return table


def _frontend_table(rows: Sequence[FrontendRow]) -> Table:
    roles = list(rows[0].cpu_ms_per_token)
    table = Table("way", "streams", "tokens/s", "of engine", *roles, title="Last columns: CPU milliseconds a token")
    for row in rows:
        used = (f"{row.cpu_ms_per_token[role]:.2f}" for role in roles)
        table.add_row(row.way, str(row.streams), f"{row.tokens_per_s:.1f}", f"{row.of_engine:.3f}", *used)
    return table
