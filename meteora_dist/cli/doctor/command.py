"""``meteora doctor``: what is wrong with this installation, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from meteora_dist.cli.doctor.finding import Finding, Status
from meteora_dist.cli.doctor.installation import check_packages, check_python, check_torch, check_triton
from meteora_dist.cli.doctor.place import check_bank, check_model, check_port, check_ray_token, check_shared_memory
from meteora_dist.cli.options import AsJson

_MARKS: dict[Status, tuple[str, str]] = {
    "ok": ("✓", "green"),
    "warning": ("!", "yellow"),
    "failure": ("✗", "red"),
}


def doctor(
    model: Annotated[Path | None, typer.Option(help="Folder of the base model. [default: the demo's]")] = None,
    bank: Annotated[Path, typer.Option(help="Folder of the bank.")] = Path("examples/bank"),
    http_port: Annotated[int, typer.Option(help="Where HTTP shall answer.", min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(help="Where gRPC shall answer.", min=1, max=65535)] = 9000,
    as_json: AsJson = False,
) -> None:
    """Check installation, devices, model, bank, ports and Ray, and say how to fix what is wrong.

    Exit code 1 when something will not work; warnings alone leave it 0.

    Example: meteora doctor --model model --bank bank
    """
    console, found = Console(soft_wrap=True, highlight=False), []
    for finding in _findings(model, bank, http_port, grpc_port):
        found.append(finding)
        if not as_json:
            console.print(_line(finding))
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in found]))
    raise typer.Exit(any(finding.status == "failure" for finding in found))


def _findings(model: Path | None, bank: Path, http_port: int, grpc_port: int) -> Iterator[Finding]:
    """One after the other: some take a second."""
    yield check_python()
    yield check_packages()
    yield check_torch()
    yield check_triton()
    yield check_model(model)
    yield check_bank(bank, model)
    yield check_port(http_port, "http")
    yield check_port(grpc_port, "grpc")
    yield check_shared_memory()
    yield check_ray_token()


def _line(finding: Finding) -> Text:
    mark, colour = _MARKS[finding.status]
    line = Text.assemble((f"{mark} ", colour), (f"{finding.check:<14}", "bold"), finding.what)
    return line.append(f"\n  {'':<14}fix: {finding.fix}", style=colour) if finding.fix else line
