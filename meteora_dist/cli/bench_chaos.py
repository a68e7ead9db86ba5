"""``meteora bench chaos``: what callers lose when ranks are killed, stopped or fail."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from rich.table import Table

from meteora_dist.bench.chaos import ChaosPlan, ChaosRow, measure_chaos
from meteora_dist.bench.chaos_ranks import Fault
from meteora_dist.errors import InvalidRequest
from meteora_dist.model.demo_model import demo_model_dir
from meteora_dist.serving.app import parse_config

_HEARTBEAT_S = 0.5


def chaos(
    model: Annotated[Path | None, typer.Option(help="Base model folder; the demo's without it.")] = None,
    bank: Annotated[Path, typer.Option(help="Bank folder.")] = Path("examples/bank"),
    ep: Annotated[int, typer.Option(help="Ranks; each owns its share of the experts.")] = 2,
    fault: Annotated[
        list[str] | None, typer.Option(help="kill (-9), stop (SIGSTOP) or raise; repeat for several. [all three]")
    ] = None,
    injections: Annotated[int, typer.Option(help="Faults of each kind.", min=1)] = 3,
    callers: Annotated[int, typer.Option(help="Streams at a time.", min=1)] = 16,
    tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 64,
    kv_cache_tokens: Annotated[int, typer.Option(help="Tokens the KV cache of a rank has room for.")] = 8192,
    standby: Annotated[bool, typer.Option(help="Whether ranks have a second process on standby.")] = True,
    heartbeat_timeout: Annotated[
        float, typer.Option(help="Seconds a rank gets to answer before it counts as stopped; a service gives it 5.")
    ] = 1.5,
    seed: Annotated[int, typer.Option(help="Of the choice of times and ranks.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
) -> None:
    """Harm ranks of a local service while callers stream, and compare every token with an undisturbed run.

    Exits with 1 when an answer failed or a token changed.

    Example: meteora bench chaos --fault kill --injections 5 --json chaos.json
    """
    kinds = fault or list(get_args(Fault))
    if unknown := sorted(set(kinds) - set(get_args(Fault))):
        raise InvalidRequest(f"--fault is {unknown[0]}, but must be one of {', '.join(get_args(Fault))}")
    settings = {
        "model": model or demo_model_dir(),
        "bank": bank,
        "ep": ep,
        "kv_cache_tokens": kv_cache_tokens,
        "standby": standby,
        "heartbeat_s": _HEARTBEAT_S,
        "heartbeat_timeout_s": heartbeat_timeout,
        "access": "open",
    }
    plan = ChaosPlan(tuple(kinds), injections, callers, tokens, seed=seed)  # type: ignore[arg-type]  # checked above
    with Console(stderr=True).status("starting the service") as status:
        rows = measure_chaos(parse_config(settings), plan, status.update)
    Console().print(_table(rows))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if any(row.failed or row.changed_tokens for row in rows):
        raise typer.Exit(1)


def _table(rows: list[ChaosRow]) -> Table:
    table = Table("fault", "injected", "requests", "failed", "changed tokens", "longest recovery, s")
    for row in rows:
        numbers = (row.faults_injected, row.requests, row.failed, row.changed_tokens)
        table.add_row(row.fault, *map(str, numbers), f"{row.recovery_s_max:.1f}")
    return table
