"""serve_config.yaml, read strictly: Serve itself passes over keys it does not know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.schema import (
    DeploymentSchema,
    HTTPOptionsSchema,
    ServeApplicationSchema,
    ServeDeploySchema,
    gRPCOptionsSchema,
)

from meteora_dist.config import faults
from meteora_dist.errors import InvalidRequest
from meteora_dist.serving.app import parse_config
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.local import Tls

IMPORT_PATH = "meteora_dist.serving.app:build"


@dataclass(frozen=True, slots=True)
class ServeFile:
    """What a configuration file says.

    Attributes:
        service: Args of its application.
        http_port: Where HTTP answers.
        grpc_port: Where gRPC answers.
        tls: What HTTP is encrypted with, if it is.
    """

    service: ServiceConfig
    http_port: int
    grpc_port: int
    tls: Tls | None = None


def read_serve_file(path: Path) -> ServeFile:
    """Reads a Serve configuration with one application of ours.

    Raises:
        InvalidRequest: It cannot be read, has unknown keys or wrong values, or deploys something else.
    """
    try:
        content = yaml.safe_load(path.read_text())
        schema = ServeDeploySchema.model_validate(content)
    except (OSError, yaml.YAMLError) as error:
        raise InvalidRequest(f"{path}: {error}") from None
    except ValidationError as error:
        raise InvalidRequest(f"{path}: {faults(error)}") from None
    if unknown := sorted(unknown_keys(content)):
        raise InvalidRequest(f"{path}: unknown keys {', '.join(unknown)}")
    ours = [app for app in schema.applications if app.import_path == IMPORT_PATH]
    if len(ours) != 1 or len(schema.applications) != 1:
        raise InvalidRequest(f"{path}: must have one application, with import_path {IMPORT_PATH}")
    args = ours[0].args
    service = parse_config(args if isinstance(args, dict) else args.model_dump())
    http = schema.http_options
    tls = Tls(Path(http.ssl_certfile), Path(http.ssl_keyfile)) if http.ssl_certfile and http.ssl_keyfile else None
    return ServeFile(service, http.port, schema.grpc_options.port, tls)


def unknown_keys(content: Mapping[str, Any]) -> Iterator[str]:
    """Paths of the keys that Serve would pass over in silence."""
    yield from _unknown(content, ServeDeploySchema, "")
    yield from _unknown(content.get("http_options") or {}, HTTPOptionsSchema, "http_options.")
    yield from _unknown(content.get("grpc_options") or {}, gRPCOptionsSchema, "grpc_options.")
    for number, app in enumerate(content.get("applications") or []):
        yield from _unknown(app, ServeApplicationSchema, f"applications.{number}.")
        for index, deployment in enumerate(app.get("deployments") or []):
            yield from _unknown(deployment, DeploymentSchema, f"applications.{number}.deployments.{index}.")


def _unknown(content: Mapping[str, Any], schema: type[BaseModel], prefix: str) -> Iterator[str]:
    yield from (prefix + key for key in content if key not in schema.model_fields)
