"""A whole service on this machine, for as long as a block runs."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO

import httpx
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions

from meteora_cluster.local import local_ray
from meteora_dist.engine.config import EngineConfig
from meteora_dist.errors import EngineUnavailable, InvalidRequest
from meteora_dist.serving.app import DEPLOYMENT, application
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.server import Server, open_model

SERVICER = "meteora_dist.serving.proto.meteora.v1.inference_pb2_grpc.add_InferenceServicer_to_server"

_APP = "meteora"
_REQUEST_TIMEOUT_S = 600.0
_READY_S = 30.0
_PROXY_START_S = 20.0
_POLL_S = 0.1


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
    config: EngineConfig,
    http_port: int = 8000,
    grpc_port: int = 9000,
    host: str = "127.0.0.1",
    server: type[Server] = Server,
) -> Iterator[Endpoints]:
    """Starts a Ray of its own and the service on it, and ends both, with every process, when the block ends.

    Args:
        config: The engine, or a whole :class:`ServiceConfig`.
        http_port: Where HTTP answers.
        grpc_port: Where gRPC answers.
        host: Where HTTP listens; gRPC always listens on every interface.
        server: The class of the replica.

    Yields:
        Where it answers, once ``/healthz`` says that the engine is ready.

    Raises:
        InvalidRequest: A port is taken.
        CheckpointError: The model or the bank cannot be used.
        EngineUnavailable: The service did not start; the message says why.
    """
    service = ServiceConfig.around(config)
    for port in (http_port, grpc_port):
        _check_free(port)
    open_model(service)
    # Serve gives up on a proxy that takes longer than five seconds to start, which happens on a busy machine.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", str(_PROXY_START_S))
    gpus = service.rank_gpus * service.mesh.size
    cpus = service.replica_cpus + service.rank_cpus * service.mesh.size
    with local_ray(cpus=cpus, gpus=int(gpus)), _quiet_serve_log():
        try:
            yield _deploy(application(service, server), http_port, grpc_port, host)
        finally:
            # Ray prints the end of Serve's controller as if it were a fault.
            with contextlib.redirect_stdout(StringIO()):
                serve.shutdown()


def _deploy(app: Application, http_port: int, grpc_port: int, host: str) -> Endpoints:
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=host, port=http_port, request_timeout_s=_REQUEST_TIMEOUT_S),
        grpc_options=gRPCOptions(
            port=grpc_port,
            grpc_servicer_functions=[SERVICER],
            request_timeout_s=_REQUEST_TIMEOUT_S,
            enable_reflection=False,
        ),
    )
    try:
        serve.run(app, name=_APP, route_prefix="/")
    except RuntimeError as error:
        raise EngineUnavailable(f"the service did not start: {_why(error)}") from None
    endpoints = Endpoints(f"http://{host}:{http_port}", f"{host}:{grpc_port}")
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
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{endpoints.http}/healthz", trust_env=False).status_code == httpx.codes.OK:
                return
        time.sleep(_POLL_S)
    raise EngineUnavailable(f"{endpoints.http}/healthz was not ready within {_READY_S:.0f} s of the deployment")


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise InvalidRequest(f"port {port} is taken: choose another one") from None


@contextlib.contextmanager
def _quiet_serve_log() -> Iterator[None]:
    log = logging.getLogger("ray.serve")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
