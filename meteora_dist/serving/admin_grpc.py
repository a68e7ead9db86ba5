"""Expert administration over gRPC: the methods of ``meteora.v1.Admin``, beside those of ``Inference``."""

from __future__ import annotations

from meteora_dist.bank import BankManifest, ExpertEntry
from meteora_dist.serving.admin import AdminService
from meteora_dist.serving.experts import ExpertStatus
from meteora_dist.serving.grpc_api import GrpcContext, GrpcMethods, given
from meteora_dist.serving.proto.meteora.v1 import admin_pb2 as pb


class AdminMethods(GrpcMethods):
    """One method an RPC; Serve's gRPC proxy finds them by name, so no two services may share one.

    Attributes:
        admin: What carries them out.
    """

    admin: AdminService

    async def AddExpert(self, request: pb.PutExpertRequest, grpc_context: GrpcContext) -> pb.BankChange:
        """Adds an expert."""
        with self._call("AddExpert", request, grpc_context) as caller:
            expected = given(request, "generation")
            return _change(await self.admin.add(caller, request.name, request.adapter, expected))

    async def ReplaceExpert(self, request: pb.PutExpertRequest, grpc_context: GrpcContext) -> pb.BankChange:
        """Puts another adapter in the place of an expert's."""
        with self._call("ReplaceExpert", request, grpc_context) as caller:
            expected = given(request, "generation")
            return _change(await self.admin.replace(caller, request.name, request.adapter, expected))

    async def RemoveExpert(self, request: pb.RemoveExpertRequest, grpc_context: GrpcContext) -> pb.BankChange:
        """Removes an expert."""
        with self._call("RemoveExpert", request, grpc_context) as caller:
            return _change(await self.admin.remove(caller, request.name, given(request, "generation")))

    async def ValidateExpert(self, request: pb.PutExpertRequest, grpc_context: GrpcContext) -> pb.ExpertDescription:
        """Checks an adapter without loading it."""
        with self._call("ValidateExpert", request, grpc_context) as caller:
            return _described(await self.admin.validate(caller, request.name, request.adapter))

    async def DescribeExperts(
        self, request: pb.DescribeExpertsRequest, grpc_context: GrpcContext
    ) -> pb.DescribeExpertsResponse:
        """Describes the experts as they are served now."""
        with self._call("DescribeExperts", request, grpc_context) as caller:
            experts = await self.admin.list(caller)
            return pb.DescribeExpertsResponse(
                generation=self.admin.manifest.generation,
                experts=[_status(expert) for expert in experts],
                replicas=[
                    pb.ReplicaDescription(replica=one.replica, generation=one.generation, state=one.state)
                    for one in self.admin.replicas
                ],
            )

    async def Rebalance(self, request: pb.RebalanceRequest, grpc_context: GrpcContext) -> pb.RebalanceResponse:
        """Evens out the load of the groups."""
        with self._call("Rebalance", request, grpc_context) as caller:
            return pb.RebalanceResponse(moved=await self.admin.rebalance(caller))


def _change(manifest: BankManifest) -> pb.BankChange:
    return pb.BankChange(generation=manifest.generation, experts=[expert.name for expert in manifest.experts])


def _described(entry: ExpertEntry) -> pb.ExpertDescription:
    return pb.ExpertDescription(**entry.model_dump())


def _status(expert: ExpertStatus) -> pb.ExpertDescription:
    message = _described(expert.entry)
    message.groups.extend(expert.groups)
    message.resident_bytes, message.requests, message.routed = expert.resident_bytes, expert.requests, expert.routed
    return message
