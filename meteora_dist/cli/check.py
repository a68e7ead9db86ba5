"""``meteora check``: whether a Serve configuration says what it means to say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from meteora_cluster.placement import world_bundles
from meteora_dist.cli.options import AsJson
from meteora_dist.serving.config_file import ServeFile, parse_serve_config, read_serve_file


def command(
    file: Annotated[str, typer.Argument(help="A serve_config.yaml, or manifests with a RayService; - reads stdin.")],
    as_json: AsJson = False,
) -> None:
    """Check a Serve configuration strictly: Serve and KubeRay pass over keys they do not know.

    Before a deployment: `kubectl kustomize k8s/overlays/gpu | meteora check -`.

    Example: meteora check serve_config.yaml
    """
    found = parse_serve_config(sys.stdin.read(), "stdin") if file == "-" else read_serve_file(Path(file))
    facts = _facts(found)
    if as_json:
        typer.echo(json.dumps(facts))
        return
    Console(soft_wrap=True, highlight=False).print(_summary(facts), markup=False)


def _facts(file: ServeFile) -> dict[str, Any]:
    """What would be deployed."""
    service, overrides = file.service, file.overrides
    replicas = overrides.get("num_replicas", 1)
    least = most = replicas
    if scaling := overrides.get("autoscaling_config"):
        least, most = scaling.get("min_replicas", 1), scaling.get("max_replicas", 1)
    return {
        "http_port": file.http_port,
        "grpc_port": file.grpc_port,
        "replicas": {"min": least, "max": most},
        "ep": service.ep,
        "tp": service.tp,
        "ranks": service.mesh.size,
        "reserved": world_bundles(service.mesh.size, service.rank, service.replica),
    }


def _summary(facts: dict[str, Any]) -> str:
    """The same, a line each."""
    least, most = facts["replicas"]["min"], facts["replicas"]["max"]
    replicas = least if least == most else f"{least} to {most}"
    return "\n".join(
        [
            f"HTTP on port {facts['http_port']}, gRPC on port {facts['grpc_port']}",
            f"replicas: {replicas}, each with {facts['ranks']} rank(s), ep {facts['ep']} x tp {facts['tp']}",
            f"a replica reserves: {', '.join(map(_bundle, facts['reserved']))}",
        ]
    )


def _bundle(bundle: dict[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in bundle.items())
