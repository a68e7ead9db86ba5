"""Expert administration over HTTP, below ``/admin``."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import Field

from meteora_dist.bank import BankManifest
from meteora_dist.config import StrictModel
from meteora_dist.serving.admin import AdminService
from meteora_dist.serving.experts import ExpertStatus
from meteora_dist.serving.http_guard import caller_of
from meteora_dist.serving.openai_reply import Json
from meteora_dist.serving.openai_schema import parse

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


def admin_routes(admin: AdminService) -> APIRouter:
    """The routes; all of them need the key of an administrator."""
    router = APIRouter(prefix="/admin")

    @router.get("/experts")
    async def list_experts(request: Request) -> Json:
        experts = await admin.list(caller_of(request))
        return {"generation": admin.manifest.generation, "experts": [_status(expert) for expert in experts]}

    @router.post("/experts", status_code=201, openapi_extra=_body(NewExpertBody))
    async def add_expert(request: Request) -> Json:
        body = parse(NewExpertBody, await request.body())
        return _change(await admin.add(caller_of(request), body.name, body.adapter, body.generation))

    @router.post("/experts/validate", openapi_extra=_body(NewExpertBody))
    async def validate_expert(request: Request) -> Json:
        body = parse(NewExpertBody, await request.body())
        entry = await admin.validate(caller_of(request), body.name, body.adapter)
        return entry.model_dump(mode="json")

    @router.put("/experts/{name}", openapi_extra=_body(AdapterBody))
    async def replace_expert(name: str, request: Request) -> Json:
        body = parse(AdapterBody, await request.body())
        return _change(await admin.replace(caller_of(request), name, body.adapter, body.generation))

    @router.delete("/experts/{name}")
    async def remove_expert(name: str, request: Request, generation: Expected = None) -> Json:
        return _change(await admin.remove(caller_of(request), name, generation))

    @router.post("/rebalance")
    async def rebalance(request: Request) -> Json:
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


def _body(model: type[AdapterBody]) -> dict[str, Any]:
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
