"""``grpc.health.v1``: whether the service answers, in the way load balancers and probes ask."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import NoReturn

import grpc
from grpc_health.v1 import health_pb2

from meteora_dist.errors import EngineUnavailable
from meteora_dist.serving.grpc_api import CallFailed, GrpcContext
from meteora_dist.serving.service import TextService

SERVICES = ("", "meteora.v1.Inference")
"""What may be asked about; all are the same engine."""


class HealthMethods:
    """The methods of ``grpc.health.v1.Health``; Serve's gRPC proxy finds them by name.

    Attributes:
        service: What answers.
    """

    service: TextService

    async def Check(
        self, request: health_pb2.HealthCheckRequest, grpc_context: GrpcContext
    ) -> health_pb2.HealthCheckResponse:
        """Whether the model answers requests right now."""
        if request.service not in SERVICES:
            _refuse(grpc_context, grpc.StatusCode.NOT_FOUND, "no such service; ask for one of ours, or for none")
        return health_pb2.HealthCheckResponse(status=self._state())

    async def List(
        self, request: health_pb2.HealthListRequest, grpc_context: GrpcContext
    ) -> health_pb2.HealthListResponse:
        """The same of every service."""
        state = health_pb2.HealthCheckResponse(status=self._state())
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(SERVICES, state))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, grpc_context: GrpcContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Is not offered: a watcher would hold one of the replica's calls for ever. Clients then do without."""
        _refuse(grpc_context, grpc.StatusCode.UNIMPLEMENTED, "Watch is not offered: ask Check from time to time")
        yield health_pb2.HealthCheckResponse()

    def _state(self) -> health_pb2.HealthCheckResponse.ServingStatus:
        try:
            self.service.check()
        except EngineUnavailable:
            return health_pb2.HealthCheckResponse.NOT_SERVING
        return health_pb2.HealthCheckResponse.SERVING


def _refuse(context: GrpcContext, code: grpc.StatusCode, details: str) -> NoReturn:
    # Serve sends both only when the method raises as well.
    context.set_code(code)
    context.set_details(details)
    raise CallFailed(details)
