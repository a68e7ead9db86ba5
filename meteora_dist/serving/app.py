"""The Ray Serve application: the only place where a class of ours becomes a deployment."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application

from meteora_cluster.placement import world_bundles
from meteora_dist.config import faults
from meteora_dist.errors import InvalidRequest
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.server import Server

DEPLOYMENT = "meteora"

_HEALTH_CHECK_S = 2.0
_SPARE_CALLS = 512
"""Calls that may come in beside those that generate or wait: they are refused by us, at once, and not by Serve."""
_START_TRIES = 2


def build(args: dict[str, Any]) -> Application:
    """The application for ``serve run``; the placement of its ranks follows from ``ep`` and the resources of each.

    Args:
        args: The fields of :class:`ServiceConfig`.

    Raises:
        InvalidRequest: A field is missing, unknown or out of range.
    """
    return application(parse_config(args))


def application(config: ServiceConfig, server: type[Server] = Server) -> Application:
    """One replica of ``server``, with a placement group that has one bundle a rank."""
    ingress: Any = serve.ingress()(server)
    deployment: Any = serve.deployment(
        ingress,
        name=DEPLOYMENT,
        ray_actor_options={"num_cpus": config.replica_cpus},
        placement_group_bundles=world_bundles(config.mesh.size, config.rank, config.replica),
        placement_group_strategy="PACK",
        # Our own limit answers first, with an error both protocols understand; health checks never wait behind it.
        max_ongoing_requests=config.max_live_requests + config.max_waiting_requests + _SPARE_CALLS,
        health_check_period_s=_HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=config.drain_s,
        max_constructor_retry_count=_START_TRIES,
    )
    bound: Application = deployment.bind(config)
    return bound


def parse_config(args: dict[str, Any]) -> ServiceConfig:
    """The configuration in a Serve application's ``args``; raises InvalidRequest naming every field at fault."""
    try:
        return ServiceConfig.model_validate(args)
    except ValidationError as error:
        raise InvalidRequest(f"the service's args: {faults(error)}") from None
