"""serve_config.yaml, read strictly: Serve itself passes over keys it does not know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

from meteora_dist.config import faults
from meteora_dist.errors import InvalidRequest
from meteora_dist.serving.app import DEPLOYMENT, parse_config
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.local import Tls

IMPORT_PATH = "meteora_dist.serving.app:build"


@dataclass(frozen=True, slots=True)
class ServeFile:
    """What a configuration says.

    Attributes:
        service: Args of its application.
        http_port: Where HTTP answers.
        grpc_port: Where gRPC answers.
        tls: What HTTP is encrypted with, if it is.
        overrides: What it sets for the deployment beside its args.
    """

    service: ServiceConfig
    http_port: int
    grpc_port: int
    tls: Tls | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


def read_serve_file(path: Path) -> ServeFile:
    """Reads a configuration file, or manifests with a RayService; see :func:`parse_serve_config`.

    Raises:
        InvalidRequest: It cannot be read, or says something wrong.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}: {error}") from None
    return parse_serve_config(text, str(path))


def parse_serve_config(text: str, origin: str) -> ServeFile:
    """Reads a Serve configuration with one application of ours, as it is or in a RayService's ``serveConfigV2``.

    Args:
        text: YAML; manifests may have other documents beside the RayService.
        origin: Where it comes from, for messages.

    Raises:
        InvalidRequest: It is no YAML, has unknown keys or wrong values, names code that cannot be imported, or deploys
            something else.
    """
    try:
        content = _serve_config(list(yaml.safe_load_all(text)), origin)
        if not isinstance(content, dict):
            raise InvalidRequest(f"{origin}: is no Serve configuration, which is a mapping with `applications`")
        schema = ServeDeploySchema.model_validate(content)
    except (yaml.YAMLError, ImportError) as error:
        raise InvalidRequest(f"{origin}: {error}") from None
    except ValidationError as error:
        raise InvalidRequest(f"{origin}: {faults(error)}") from None
    if unknown := sorted(unknown_keys(content)):
        raise InvalidRequest(f"{origin}: unknown keys {', '.join(unknown)}")
    if [app.import_path for app in schema.applications] != [IMPORT_PATH]:
        raise InvalidRequest(f"{origin}: must have one application, with import_path {IMPORT_PATH}")
    (app,) = schema.applications
    if strangers := [deployment.name for deployment in app.deployments if deployment.name != DEPLOYMENT]:
        raise InvalidRequest(f"{origin}: the application has one deployment, {DEPLOYMENT}, not {', '.join(strangers)}")
    overrides = app.deployments[0].model_dump(exclude_unset=True) if app.deployments else {}
    http = schema.http_options
    tls = Tls(Path(http.ssl_certfile), Path(http.ssl_keyfile)) if http.ssl_certfile and http.ssl_keyfile else None
    return ServeFile(parse_config(app.args), http.port, schema.grpc_options.port, tls, overrides)


def unknown_keys(content: Mapping[str, Any]) -> Iterator[str]:
    """Paths of the keys that Serve would pass over in silence; what a field may hold freely, as ``args``, is left out.

    Args:
        content: A configuration that Serve accepts.
    """
    yield from _unknown(content, ServeDeploySchema, "")


def _serve_config(documents: list[Any], origin: str) -> Any:
    """The configuration itself: the only document, or a string in the only RayService among them."""
    services = [item for item in documents if isinstance(item, dict) and item.get("kind") == "RayService"]
    if not services and len(documents) == 1:
        return documents[0]
    if len(services) != 1:
        raise InvalidRequest(f"{origin}: must be one configuration, or manifests with one RayService")
    return yaml.safe_load(services[0].get("spec", {}).get("serveConfigV2") or "")


def _unknown(value: Any, annotation: Any, prefix: str) -> Iterator[str]:
    """Looks into whatever the annotation declares as a model, in lists and optional ones as well."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _unknown(item, annotation, f"{prefix}{number}.")
    elif isinstance(value, Mapping):
        for model in _models(annotation):
            for key, inner in value.items():
                if key not in model.model_fields:
                    yield prefix + key
                elif key == "runtime_env":
                    yield from (f"{prefix}runtime_env.{name}" for name in inner if name not in RuntimeEnv.known_fields)
                else:
                    yield from _unknown(inner, model.model_fields[key].annotation, f"{prefix}{key}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
