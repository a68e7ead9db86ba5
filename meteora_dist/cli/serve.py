"""``meteora serve``: the service on this machine until Ctrl-C."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from meteora_dist.model.demo_model import demo_model_dir
from meteora_dist.serving.app import parse_config
from meteora_dist.serving.config_file import ServeFile, read_serve_file
from meteora_dist.serving.local import Endpoints, running_service

DEMO_BANK = Path("examples/bank")


def command(
    model: Annotated[Path | None, typer.Option(help="Folder of the base model. [default: the demo's]")] = None,
    bank: Annotated[Path | None, typer.Option(help="Folder of the bank. [default: examples/bank]")] = None,
    ep: Annotated[int | None, typer.Option(help="Ranks; each owns its share of the experts. [default: 1]")] = None,
    http_port: Annotated[int | None, typer.Option(help="Where HTTP answers. [default: 8000]")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Where gRPC answers. [default: 9000]")] = None,
    config: Annotated[Path | None, typer.Option(help="A serve_config.yaml; other options override it.")] = None,
) -> None:
    """Serve a bank over HTTP and gRPC on a local Ray, and stay up until Ctrl-C.

    On a cluster, deploy a configuration file with `serve deploy` instead.
    """
    overrides = {"model": model, "bank": bank, "ep": ep}
    settings = _settings(config, {name: value for name, value in overrides.items() if value is not None})
    http, grpc = http_port or settings.http_port, grpc_port or settings.grpc_port
    console = Console()
    # A service manager ends us with SIGTERM; both ways have to clean up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    progress = console.status(f"starting {settings.service.mesh.size} rank(s) with {settings.service.bank}")
    progress.start()
    try:
        with running_service(settings.service, http, grpc) as endpoints:
            progress.stop()
            _announce(console, endpoints)
            signal.pause()
    except KeyboardInterrupt:
        console.print("stopped")
    finally:
        progress.stop()


def _settings(config: Path | None, overrides: dict[str, Any]) -> ServeFile:
    if config is None:
        return ServeFile(parse_config({"model": demo_model_dir(), "bank": DEMO_BANK, **overrides}), 8000, 9000)
    file = read_serve_file(config)
    return ServeFile(parse_config(file.service.model_dump() | overrides), file.http_port, file.grpc_port)


def _announce(console: Console, endpoints: Endpoints) -> None:
    console.print(f"HTTP  {endpoints.http}/v1", highlight=False)
    console.print(f"gRPC  {endpoints.grpc}", highlight=False)
    console.print("ready; Ctrl-C ends it")
