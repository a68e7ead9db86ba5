"""A whole service on this machine, for as long as a block runs."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

from meteora_cluster.local import local_ray
from meteora_dist.errors import EngineUnavailable, InvalidRequest
from meteora_dist.serving.app import DEPLOYMENT, application
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.ports import is_free
from meteora_dist.serving.server import Server, open_model

_PROTO = "meteora_dist.serving.proto.meteora.v1"
SERVICERS = (
    f"{_PROTO}.inference_pb2_grpc.add_InferenceServicer_to_server",
    f"{_PROTO}.admin_pb2_grpc.add_AdminServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
)

_APP = "meteora"
_PORTS = 2**16
_REQUEST_TIMEOUT_S = 600.0
_READY_S = 30.0
_PROXY_START_S = 20.0
_POLL_S = 0.1
_DRAIN_SPARE_S = 5.0


@dataclass(frozen=True, slots=True)
class Tls:
    """What HTTP is encrypted with.

    Attributes:
        certificate: PEM file of the certificate and its chain.
        key: PEM file of its private key, without a password.
    """

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Where a service answers.

    Attributes:
        http: Base URL, without a slash at its end.
        grpc: Target of a gRPC channel.
    """

    http: str
    grpc: str


@contextlib.contextmanager
def running_service(
    config: ServiceConfig,
    http_port: int = 8000,
    grpc_port: int = 9000,
    host: str = "127.0.0.1",
    server: type[Server] = Server,
    tls: Tls | None = None,
) -> Iterator[Endpoints]:
    """Starts a Ray of its own and the service on it, and ends both, with every process, when the block ends.

    Args:
        config: The service.
        http_port: Where HTTP answers.
        grpc_port: Where gRPC answers.
        host: Where HTTP listens; gRPC always listens on every interface.
        server: The class of the replica.
        tls: What HTTP is encrypted with; None leaves it plain. gRPC always is.

    Yields:
        Where it answers, once ``/healthz`` says that the engine is ready.

    Raises:
        InvalidRequest: A port is taken, is none, or is given twice; or there are no API keys though the configuration
            demands them.
        CheckpointError: The model, the bank or the keys file cannot be used.
        EngineUnavailable: The service did not start; the message says why.
    """
    if http_port == grpc_port:
        raise InvalidRequest(f"HTTP and gRPC cannot both answer on port {http_port}: choose two")
    for port in (http_port, grpc_port):
        if not 0 < port < _PORTS:
            raise InvalidRequest(f"{port} is no port: choose one from 1 to {_PORTS - 1}")
        if not is_free(port):
            raise InvalidRequest(f"port {port} is taken: choose another one")
    Gate.of(config)
    open_model(config)
    os.environ["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"] = str(config.max_body_bytes)
    # Serve gives up on a proxy that takes longer than five seconds to start, which happens on a busy machine.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(_PROXY_START_S))
    gpus = config.rank_gpus * config.mesh.size
    cpus = config.replica_cpus + config.rank_cpus * config.mesh.size
    with local_ray(cpus=cpus, gpus=int(gpus)), _quiet_serve_log():
        try:
            yield _deploy(application(config, server), http_port, grpc_port, host, tls)
        finally:
            # Ray prints the end of Serve's controller as if it were a fault.
            with contextlib.redirect_stdout(StringIO()):
                serve.shutdown()


def drain(timeout_s: float) -> bool:
    """Lets the running service refuse new calls and finish those under way; whether all ended within ``timeout_s``.

    Serve's own shutdown would not wait: it ends the proxy first, and with it every stream.
    """
    replica: Any = serve.get_deployment_handle(DEPLOYMENT, _APP)
    done: bool = replica.drain.remote(timeout_s).result(timeout_s=timeout_s + _DRAIN_SPARE_S)
    return done


def _deploy(app: Application, http_port: int, grpc_port: int, host: str, tls: Tls | None) -> Endpoints:
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(
            host=host,
            port=http_port,
            request_timeout_s=_REQUEST_TIMEOUT_S,
            ssl_certfile=None if tls is None else str(tls.certificate),
            ssl_keyfile=None if tls is None else str(tls.key),
        ),
        grpc_options=gRPCOptions(
            port=grpc_port,
            grpc_servicer_functions=list(SERVICERS),
            request_timeout_s=_REQUEST_TIMEOUT_S,
            enable_reflection=False,
        ),
    )
    try:
        serve.run(app, name=_APP, route_prefix="/")
    except RuntimeError as error:
        raise EngineUnavailable(f"the service did not start: {_why(error)}") from None
    endpoints = Endpoints(f"{'http' if tls is None else 'https'}://{host}:{http_port}", f"{host}:{grpc_port}")
    _await_health(endpoints)
    return endpoints


def _why(error: RuntimeError) -> str:
    """The last line of what the replica said: the message of the error that ended it."""
    deployments = serve.status().applications[_APP].deployments
    message = deployments[DEPLOYMENT].message if DEPLOYMENT in deployments else str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else str(error)


def _await_health(endpoints: Endpoints) -> None:
    deadline = time.monotonic() + _READY_S
    # Our own process on our own machine: whose name its certificate bears does not matter.
    with httpx.Client(trust_env=False, verify=False) as client:
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if client.get(f"{endpoints.http}/healthz").status_code == httpx.codes.OK:
                    return
            time.sleep(_POLL_S)
    raise EngineUnavailable(f"{endpoints.http}/healthz was not ready within {_READY_S:.0f} s of the deployment")


@contextlib.contextmanager
def _quiet_serve_log() -> Iterator[None]:
    log = logging.getLogger("ray.serve")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
