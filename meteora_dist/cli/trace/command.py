"""``meteora trace``: which experts wrote an answer, as a page, a picture or JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meteora_dist.cli.service_options import URL, ApiKey, Experts, MaxTokens, Model, Seed, Temperature, Url
from meteora_dist.cli.trace.page import trace_page
from meteora_dist.client import Client, Message, Options, Routing, RoutingTrace
from meteora_dist.errors import InvalidRequest, MeteoraError


def trace(
    prompt: Annotated[str, typer.Argument(help="The question; - reads it from stdin.")],
    out: Annotated[Path, typer.Option(help="The page to write, one HTML file that loads nothing.")] = Path(
        "trace.html"
    ),
    png: Annotated[Path | None, typer.Option(help="Also write a picture; needs matplotlib.")] = None,
    url: Url = URL,
    model: Model = "auto",
    top_k: Experts = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the trace as JSON, and write no page.")] = False,
) -> None:
    """Ask a running service one question and draw who wrote the answer: by token, expert and layer.

    Example: meteora trace "I have a peach and two trumpets. How many fruits do I have?" --out trace.html
    """
    if png is not None and find_spec("matplotlib") is None:
        raise InvalidRequest("--png needs matplotlib; pip install 'meteora-dist[eval]' brings it")
    question = sys.stdin.read() if prompt == "-" else prompt
    routing = Routing(top_k=top_k, trace="layers")
    options = Options(model=model, max_tokens=max_tokens, temperature=temperature, routing=routing)
    if seed is not None:
        options["seed"] = seed
    with Console(stderr=True).status(f"asking {url}"), Client(url, api_key=api_key) as client:
        messages: list[Message] = [{"role": "user", "content": question}]
        reply = client.generate(messages, **options)
    found = reply.answers[0].routing
    if found is None:
        raise InvalidRequest(f"{url} sent no routing trace")
    if as_json:
        typer.echo(json.dumps({"prompt": question, "model": model, "text": reply.text, **asdict(found)}))
        return
    files = [out] if png is None else [out, png]
    try:
        _write(question, model, found, out, png)
    except OSError as cause:
        raise MeteoraError(f"{cause.filename or out} cannot be written: {cause.strerror}") from cause
    said = (
        f"{reply.text}\n\n{', '.join(map(str, files))}: {len(found.tokens)} tokens, {found.dominating or 'no expert'}"
    )
    Console(soft_wrap=True, highlight=False).print(said, markup=False)


def _write(question: str, model: str, found: RoutingTrace, out: Path, png: Path | None) -> None:
    out.write_text(trace_page(question, model, found), encoding="utf-8")
    if png is not None:
        # Slow to import.
        from meteora_dist.cli.trace.picture import draw_trace

        draw_trace(found, png)
