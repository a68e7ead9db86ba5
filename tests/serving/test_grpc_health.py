"""``grpc.health.v1`` over a scripted engine."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from meteora_dist.errors import EngineUnavailable
from meteora_dist.serving.grpc_api import CallFailed
from meteora_dist.serving.grpc_health import HealthMethods
from meteora_dist.serving.proto.meteora.v1.inference_pb2_grpc import InferenceServicer
from tests.serving.asking import Context
from tests.serving.conftest import MakeService
from tests.serving.scripted import ScriptedEngine

Check = health_pb2.HealthCheckRequest


def health(make_service: MakeService, engine: ScriptedEngine) -> HealthMethods:
    methods = HealthMethods()
    methods.service = make_service(engine)
    return methods


@pytest.mark.parametrize("service", ["", "meteora.v1.Inference"])
async def test_it_serves_when_the_engine_answers(make_service: MakeService, service: str) -> None:
    engine = ScriptedEngine([])
    asked = health(make_service, engine)
    assert (await asked.Check(Check(service=service), Context())).status == health_pb2.HealthCheckResponse.SERVING
    engine.healthy = EngineUnavailable("rebuilding")
    assert (await asked.Check(Check(service=service), Context())).status == health_pb2.HealthCheckResponse.NOT_SERVING
    listed = await asked.List(health_pb2.HealthListRequest(), Context())
    assert listed.statuses[service].status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_unknown_services_and_watching_are_refused(make_service: MakeService) -> None:
    asked, context = health(make_service, ScriptedEngine([])), Context()
    with pytest.raises(CallFailed):
        await asked.Check(Check(service="nobody"), context)
    assert context.code == grpc.StatusCode.NOT_FOUND
    with pytest.raises(CallFailed):
        await anext(aiter(asked.Watch(Check(), context)))
    assert context.code == grpc.StatusCode.UNIMPLEMENTED


def test_every_method_is_there_and_none_hides_one_of_ours() -> None:
    # Serve finds a method by the last part of the RPC's path alone.
    theirs = {name for name in dir(health_pb2_grpc.HealthServicer) if name[0].isupper()}
    assert theirs == {"Check", "List", "Watch"} <= set(dir(HealthMethods))
    assert not theirs & set(dir(InferenceServicer))
