"""``meteora bench serve``: load on any OpenAI endpoint."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from meteora_dist.bench.load import Call, LoadPlan, send
from meteora_dist.bench.load_page import page, shown
from meteora_dist.bench.load_report import LoadRow, first_words, report


def serve(
    url: Annotated[str, typer.Argument(help="Where the endpoint answers, with its /v1.")],
    model: Annotated[list[str] | None, typer.Option(help="Model to ask; repeat for several, in turn. [auto]")] = None,
    concurrency: Annotated[int, typer.Option(help="Streams at a time.", min=1)] = 8,
    requests: Annotated[int | None, typer.Option(help="Requests in all. [64, without --duration]", min=1)] = None,
    duration: Annotated[float | None, typer.Option(help="Seconds in which requests are begun.", min=0.1)] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt, about.", min=1)] = 32,
    answer_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 32,
    spread: Annotated[float, typer.Option(help="By what part of them lengths may be less.", min=0, max=0.99)] = 0.0,
    chat: Annotated[bool, typer.Option(help="Ask the chat endpoint.")] = False,
    ignore_eos: Annotated[bool, typer.Option(help="Answers go on to their most tokens, where that is known.")] = False,
    api_key: Annotated[str | None, typer.Option(envvar="METEORA_API_KEY", help="Sent with every request.")] = None,
    timeout: Annotated[float, typer.Option(help="Most seconds of a request.", min=0.1)] = 300.0,
    ramp: Annotated[float, typer.Option(help="Seconds over which the streams begin.", min=0)] = 0.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the rows to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also write a page of curves to this file (HTML).")] = None,
) -> None:
    """Send a bounded load to an OpenAI endpoint: throughput, time to first token, between tokens, end to end, errors.

    Exits with 1 when a request failed otherwise than with 429.

    Example: meteora bench serve http://127.0.0.1:8000/v1 --model auto --model base --requests 200 --plot load.html
    """
    plan = LoadPlan(
        url=url,
        models=tuple(model or ["auto"]),
        concurrency=concurrency,
        requests=64 if requests is None and duration is None else requests,
        duration_s=duration,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        spread=spread,
        chat=chat,
        ignore_eos=ignore_eos,
        api_key=api_key,
        timeout_s=timeout,
        ramp_s=ramp,
    )
    calls = run(plan)
    rows = report(calls)
    Console().print(load_table(rows))
    say_failures(first_words(calls))
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if plot is not None:
        plot.write_text(page(f"{url}, {concurrency} streams at a time", calls))
    if rows[0].errors:
        raise typer.Exit(1)


def run(plan: LoadPlan) -> list[Call]:
    """Sends the load, and shows how many requests have ended."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("requests", total=plan.requests)
        return asyncio.run(send(plan, lambda call: progress.advance(task)))


def load_table(rows: Sequence[LoadRow]) -> Table:
    """The rows for people; times are p50 / p90 / p99."""
    table = Table("model", "whole", "429", "errors", "requests/s", "tokens/s", title="Times: p50 / p90 / p99 in ms")
    for name in ("TTFT", "inter-token", "end to end", "refusal"):
        table.add_column(name)
    for row in rows:
        errors = ", ".join(f"{count} x {kind}" for kind, count in row.errors.items()) or "0"
        table.add_row(
            *(row.model, str(row.completed), str(row.rejected), errors),
            *(f"{row.requests_per_s:.2f}", f"{row.tokens_per_s:.1f}"),
            *map(shown, (row.ttft_ms, row.inter_token_ms, row.end_to_end_ms, row.reject_ms)),
        )
    return table


def say_failures(words: Mapping[str, str]) -> None:
    """What the endpoint said about each kind of failure, on stderr."""
    for kind, detail in words.items():
        Console(stderr=True).print(f"{kind}: {detail[:300]}", highlight=False, markup=False)
