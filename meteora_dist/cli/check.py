"""``meteora check``: whether a Serve configuration says what it means to say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from meteora_cluster.placement import world_bundles
from meteora_dist.serving.config_file import ServeFile, parse_serve_config, read_serve_file


def command(
    file: Annotated[str, typer.Argument(help="A serve_config.yaml, or manifests with a RayService; - reads stdin.")],
) -> None:
    """Check a Serve configuration strictly: Serve and KubeRay pass over keys they do not know.

    Before a deployment: `kubectl kustomize k8s/overlays/gpu | meteora check -`.

    Example: meteora check serve_config.yaml
    """
    found = parse_serve_config(sys.stdin.read(), "stdin") if file == "-" else read_serve_file(Path(file))
    Console(soft_wrap=True, highlight=False).print(_summary(found), markup=False)


def _summary(file: ServeFile) -> str:
    """What would be deployed, a line each."""
    service, overrides = file.service, file.overrides
    replicas = overrides.get("num_replicas", 1)
    if scaling := overrides.get("autoscaling_config"):
        replicas = f"{scaling.get('min_replicas', 1)} to {scaling.get('max_replicas', 1)}"
    bundles = world_bundles(service.mesh.size, service.rank, service.replica)
    return "\n".join(
        [
            f"HTTP on port {file.http_port}, gRPC on port {file.grpc_port}",
            f"replicas: {replicas}, each with {service.mesh.size} rank(s), ep {service.ep} x tp {service.tp}",
            f"a replica reserves: {', '.join(map(_bundle, bundles))}",
        ]
    )


def _bundle(bundle: dict[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in bundle.items())
