"""``meteora serve``: the service on this machine until Ctrl-C."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from meteora_dist.model.demo_model import demo_model_dir
from meteora_dist.serving.app import parse_config
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.config_file import ServeFile, read_serve_file
from meteora_dist.serving.local import Endpoints, drain, running_service

DEMO_BANK = Path("examples/bank")


def command(
    model: Annotated[Path | None, typer.Option(help="Folder of the base model. [default: the demo's]")] = None,
    bank: Annotated[Path | None, typer.Option(help="Folder of the bank. [default: examples/bank]")] = None,
    ep: Annotated[int | None, typer.Option(help="Ranks; each owns its share of the experts. [default: 1]")] = None,
    http_port: Annotated[int | None, typer.Option(help="Where HTTP answers. [default: 8000]")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Where gRPC answers. [default: 9000]")] = None,
    keys: Annotated[
        Path | None, typer.Option(help="File of API keys; see `meteora keys new`. [default: everybody may call]")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A serve_config.yaml; other options override it.")] = None,
) -> None:
    """Serve a bank over HTTP and gRPC on a local Ray, and stay up until Ctrl-C.

    SIGTERM lets what is under way come to its end first, for as long as the configuration's drain_s.

    On a cluster, deploy a configuration file with `serve deploy` instead.

    Example: meteora serve --model model --bank bank --ep 2
    """
    overrides = {"model": model, "bank": bank, "ep": ep, "keys_file": keys, "access": "keys" if keys else None}
    settings = _settings(config, {name: value for name, value in overrides.items() if value is not None})
    http, grpc = http_port or settings.http_port, grpc_port or settings.grpc_port
    console = Console()
    # A service manager ends us with SIGTERM; both ways have to clean up.
    before = signal.signal(signal.SIGTERM, _terminate)
    progress = console.status(f"starting {settings.service.mesh.size} rank(s) with {settings.service.bank}")
    progress.start()
    try:
        with running_service(settings.service, http, grpc, tls=settings.tls) as endpoints:
            progress.stop()
            _announce(console, endpoints, settings.service)
            _stay(console, settings.service.drain_s)
    except KeyboardInterrupt:
        console.print("stopped")
    finally:
        progress.stop()
        signal.signal(signal.SIGTERM, before)


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


def _terminate(*_: object) -> None:
    raise _Terminated


def _stay(console: Console, drain_s: float) -> None:
    """Waits for a signal, and after SIGTERM for the calls under way as well; a second signal ends that too."""
    try:
        signal.pause()
    except _Terminated:
        console.print(f"finishing what is under way, for {drain_s:g} s at most")
        if not drain(drain_s):
            console.print("some calls were not done in time, and are cut off")


def _settings(config: Path | None, overrides: dict[str, Any]) -> ServeFile:
    if config is None:
        defaults = {"model": demo_model_dir(), "bank": DEMO_BANK, "access": "open"}
        return ServeFile(parse_config(defaults | overrides), 8000, 9000)
    file = read_serve_file(config)
    return replace(file, service=parse_config(file.service.model_dump() | overrides))


def _announce(console: Console, endpoints: Endpoints, service: ServiceConfig) -> None:
    console.print(f"HTTP  {endpoints.http}/v1", highlight=False)
    if service.playground:
        console.print(f"page  {endpoints.http}/", highlight=False)
    console.print(f"gRPC  {endpoints.grpc}", highlight=False)
    if service.access == "open":
        console.print("access is open: no API key is needed, and gRPC listens on every interface")
    console.print("ready; Ctrl-C ends it")
