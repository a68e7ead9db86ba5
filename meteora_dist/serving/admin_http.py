"""Expert administration over HTTP, below ``/admin``."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field

from meteora_dist.bank import BankManifest, ExpertEntry
from meteora_dist.config import StrictModel
from meteora_dist.serving.admin import AdminService
from meteora_dist.serving.experts import ExpertStatus
from meteora_dist.serving.http_guard import caller_of
from meteora_dist.serving.openai_reply import Json
from meteora_dist.serving.openai_schema import parse
from meteora_dist.serving.openapi import ADMIN, answers, body

Expected = Annotated[
    int | None, Query(description="The generation the caller takes for the newest; stale ones are refused.")
]


class AdapterBody(StrictModel):
    """An adapter for an expert.

    Attributes:
        adapter: Its folder, relative to one of the service's ``expert_roots``.
        generation: The generation the caller takes for the newest; a stale one is refused.
    """

    adapter: str = Field(max_length=4096)
    generation: int | None = None


class NewExpertBody(AdapterBody):
    """A new expert.

    Attributes:
        name: What requests call it.
    """

    name: str


class ExpertRow(ExpertEntry):
    """An expert as it is served now.

    Attributes:
        groups: The expert-parallel groups that hold it.
        resident_bytes: Its matrices on all ranks together.
        requests: Calls that chose it by name or in a blend, since the service started.
        routed: How often tokens were routed to it, once for every linear, since the ranks started.
    """

    groups: tuple[int, ...]
    resident_bytes: int
    requests: int
    routed: int


class ReplicaRow(StrictModel):
    """A replica that shares the bank.

    Attributes:
        replica: Its name.
        generation: Which its new requests use.
        state: ``starting``, ``serving``, or ``behind`` when it could not load a newer generation.
    """

    replica: str
    generation: int
    state: Literal["starting", "serving", "behind"]


class ExpertTable(StrictModel):
    """The experts of the newest generation of the bank, as the replica that answers serves them.

    Attributes:
        generation: Its number.
        experts: In the order of routing shares.
        replicas: The one that answers, then the others as they were ``generations_poll_s`` ago, or two of them.
    """

    generation: int
    experts: tuple[ExpertRow, ...]
    replicas: tuple[ReplicaRow, ...]


class Changed(StrictModel):
    """What a change has made. Other replicas load it within moments.

    Attributes:
        generation: Of the bank, after the change.
        experts: Names of its experts, in the order of routing shares.
    """

    generation: int
    experts: tuple[str, ...]


class Moved(StrictModel):
    """What rebalancing has done.

    Attributes:
        moved: Adapters that have moved at this replica, 0 when moving would gain too little; others follow by their
            own loads.
    """

    moved: int


ADMIN_READS = (AdapterBody, NewExpertBody)
ADMIN_WRITES = (ExpertTable, Changed, ExpertEntry, Moved)


def admin_routes(admin: AdminService) -> APIRouter:
    """The routes; all of them need the key of an administrator."""
    router = APIRouter(prefix="/admin")

    @router.get("/experts", responses=answers(ExpertTable, *ADMIN), response_model=None, operation_id="listExperts")
    async def list_experts(request: Request) -> Json:
        """Describes the experts as they are served now, and what each replica serves."""
        experts = await admin.list(caller_of(request))
        return {
            "generation": admin.manifest.generation,
            "experts": [_status(expert) for expert in experts],
            "replicas": [replica.model_dump(include=set(ReplicaRow.model_fields)) for replica in admin.replicas],
        }

    @router.post(
        "/experts",
        status_code=201,
        openapi_extra=body(NewExpertBody),
        responses=answers(Changed, *ADMIN, status=201),
        response_model=None,
        operation_id="addExpert",
    )
    async def add_expert(request: Request) -> Json:
        """Adds an expert; new requests may use it as soon as the call returns."""
        new = parse(NewExpertBody, await request.body())
        return _change(await admin.add(caller_of(request), new.name, new.adapter, new.generation))

    @router.post(
        "/experts/validate",
        openapi_extra=body(NewExpertBody),
        responses=answers(ExpertEntry, *ADMIN),
        response_model=None,
        operation_id="validateExpert",
    )
    async def validate_expert(request: Request) -> Json:
        """Checks what adding or replacing would check before anything is loaded."""
        new = parse(NewExpertBody, await request.body())
        entry = await admin.validate(caller_of(request), new.name, new.adapter)
        return entry.model_dump(mode="json")

    @router.put(
        "/experts/{name}",
        openapi_extra=body(AdapterBody),
        responses=answers(Changed, *ADMIN),
        response_model=None,
        operation_id="replaceExpert",
    )
    async def replace_expert(name: str, request: Request) -> Json:
        """Puts another adapter in the place of an expert's; requests under way finish with the old one."""
        new = parse(AdapterBody, await request.body())
        return _change(await admin.replace(caller_of(request), name, new.adapter, new.generation))

    @router.delete(
        "/experts/{name}", responses=answers(Changed, *ADMIN), response_model=None, operation_id="removeExpert"
    )
    async def remove_expert(name: str, request: Request, generation: Expected = None) -> Json:
        """Removes an expert; requests under way finish with it."""
        return _change(await admin.remove(caller_of(request), name, generation))

    @router.post("/rebalance", responses=answers(Moved, *ADMIN), response_model=None, operation_id="rebalance")
    async def rebalance(request: Request) -> Json:
        """Moves experts to other groups of ranks, so that loads are even: at every replica, by its own loads."""
        return {"moved": await admin.rebalance(caller_of(request))}

    return router


def _status(expert: ExpertStatus) -> Json:
    return {
        **expert.entry.model_dump(mode="json"),
        "groups": expert.groups,
        "resident_bytes": expert.resident_bytes,
        "requests": expert.requests,
        "routed": expert.routed,
    }


def _change(manifest: BankManifest) -> Json:
    return {"generation": manifest.generation, "experts": [expert.name for expert in manifest.experts]}
