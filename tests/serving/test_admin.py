"""Expert administration over HTTP and gRPC, on a real engine in this process: who may, from where, and what it does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from meteora_dist.bank import Bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.errors import InvalidRequest
from meteora_dist.serving.grpc_api import CallFailed
from meteora_dist.serving.proto.meteora.v1 import admin_pb2 as pb
from meteora_dist.serving.sources import Sources
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.administered import ADMIN, USER, Site, administered, write_adapters
from tests.serving.asking import Context


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tiny_bank: Bank) -> Iterator[RankEngine]:
    engine = RankEngine(EngineConfig(model=tiny_base, bank=tiny_bank.path, max_model_len=128, kv_cache_tokens=4096))
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def root(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapters(tiny_base, tmp_path_factory.mktemp("experts"), tmp_path_factory.mktemp("outside"))


@pytest.fixture
async def site(
    engine: RankEngine, tiny_bank: Bank, tokenizer: TextTokenizer, root: Path, tmp_path: Path
) -> AsyncIterator[Site]:
    async with administered(engine, tiny_bank.path, tokenizer, root, tmp_path) as site:
        yield site


async def answer(site: Site, model: str) -> str:
    body = {"prompt": "Who answers?", "model": model, "temperature": 0, "max_tokens": 6}
    got = await site.http.post("/v1/completions", headers=USER, json=body)
    return str(got.json()["choices"][0]["text"]) if got.status_code == 200 else got.json()["error"]["code"]


async def test_an_expert_is_added_used_replaced_and_removed(site: Site) -> None:
    before, names = await site.generation(), await site.names()
    added = await site.add("new", "team/good")
    assert (added.status_code, added.json()) == (201, {"generation": before + 1, "experts": [*names, "new"]})
    first = await answer(site, "new")
    body = {"adapter": "other", "generation": before + 1}
    replaced = await site.http.put("/admin/experts/new", headers=ADMIN, json=body)
    assert (replaced.status_code, replaced.json()["generation"]) == (200, before + 2)
    assert await answer(site, "new") not in (first, "model_not_found")
    removed = await site.http.delete(f"/admin/experts/new?generation={before + 2}", headers=ADMIN)
    assert (removed.status_code, removed.json()["experts"]) == (200, names)
    assert await answer(site, "new") == "model_not_found"


async def test_grpc_does_the_same(site: Site) -> None:
    before = await site.generation()
    context = Context("the-admin")
    added = await site.methods.AddExpert(pb.PutExpertRequest(name="new", adapter="team/good"), context)
    assert (added.generation, added.experts[-1]) == (before + 1, "new")
    request = pb.PutExpertRequest(name="new", adapter="other", generation=before + 1)
    assert (await site.methods.ReplaceExpert(request, context)).generation == before + 2
    await answer(site, "new")
    described = await site.methods.DescribeExperts(pb.DescribeExpertsRequest(), context)
    over_http = (await site.http.get("/admin/experts", headers=ADMIN)).json()
    assert described.generation == over_http["generation"] == before + 2
    (me,) = over_http["replicas"]
    assert (me["generation"], me["state"]) == (before + 2, "serving")
    assert [(one.replica, one.generation, one.state) for one in described.replicas] == [tuple(me.values())]
    for one, same in zip(described.experts, over_http["experts"], strict=True):
        assert {
            name: getattr(one, name) for name in ("name", "digest", "gate", "resident_bytes", "requests", "routed")
        } == {name: same[name] for name in ("name", "digest", "gate", "resident_bytes", "requests", "routed")}
        assert (list(one.targets), list(one.groups)) == (same["targets"], same["groups"])
    new = described.experts[-1]
    assert (new.name, new.rank, new.gate, list(new.groups), new.requests) == ("new", 2, "prototype", [0], 1)
    assert new.resident_bytes > 0 < new.routed
    assert (await site.methods.Rebalance(pb.RebalanceRequest(), context)).moved == 0
    assert (await site.methods.RemoveExpert(pb.RemoveExpertRequest(name="new"), context)).generation == before + 3
    assert context.code is None


async def test_a_stale_generation_is_refused_with_both_numbers(site: Site) -> None:
    newest = await site.generation()
    got = await site.add("new", "team/good", generation=newest - 1)
    assert (got.status_code, got.json()["error"]["code"]) == (409, "stale_generation")
    assert f"generation {newest - 1} of the bank, but the newest is {newest}" in got.json()["error"]["message"]
    context = Context("the-admin")
    with pytest.raises(CallFailed):
        await site.methods.RemoveExpert(pb.RemoveExpertRequest(name="plain", generation=newest - 1), context)
    assert context.code is grpc.StatusCode.ABORTED


async def test_validating_loads_nothing(site: Site) -> None:
    before = await site.generation()
    body = {"name": "new", "adapter": "team/good"}
    got = await site.http.post("/admin/experts/validate", headers=ADMIN, json=body)
    entry = got.json()
    assert (got.status_code, entry["rank"], entry["alpha"], entry["gate"]) == (200, 3, 6.0, "prototype")
    request = pb.PutExpertRequest(name="new", adapter="team/good")
    assert (await site.methods.ValidateExpert(request, Context("the-admin"))).digest == entry["digest"]
    assert (await site.generation(), "new" in await site.names()) == (before, False)


@pytest.mark.parametrize("headers", [USER, {}, {"Authorization": "Bearer guess"}])
async def test_only_administrators_may(site: Site, headers: dict[str, str]) -> None:
    before, body = await site.generation(), {"name": "new", "adapter": "team/good"}
    status = 403 if headers == USER else 401
    for method, path in (
        *(("GET", "/admin/experts"), ("POST", "/admin/experts"), ("POST", "/admin/experts/validate")),
        *(("PUT", "/admin/experts/plain"), ("DELETE", "/admin/experts/plain"), ("POST", "/admin/rebalance")),
    ):
        sent = body if path != "/admin/experts/plain" else {"adapter": "team/good"}
        got = await site.http.request(method, path, headers=headers, json=sent)
        assert got.status_code == status, path
    context = Context("a-user" if headers == USER else "guess")
    for call, request in (
        (site.methods.AddExpert, pb.PutExpertRequest(name="new", adapter="team/good")),
        (site.methods.RemoveExpert, pb.RemoveExpertRequest(name="plain")),
        (site.methods.DescribeExperts, pb.DescribeExpertsRequest()),
        (site.methods.Rebalance, pb.RebalanceRequest()),
    ):
        with pytest.raises(CallFailed):
            await call(request, context)  # type: ignore[operator]
        assert context.code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
    assert await site.generation() == before


@pytest.mark.parametrize(
    ("adapter", "says"),
    [
        ("../outside/secret", "without '..'"),
        ("team/../../x", "without '..'"),
        ("/etc", "must be a path below"),
        ("", "must be a path below"),
        ("nowhere", "there is no folder 'nowhere'"),
        ("x" * 300, "there is no folder 'xxx"),
        ("loop", "there is no folder 'loop'"),
        ("link", "link leads out of its expert root"),
        ("linked-file", "linked-file/adapter_model.safetensors leads out"),
        ("a\0b", "must be a path below"),
        ("pickled", "pickled/adapter_model.safetensors: not a safetensors file"),
        ("lying", "lying/adapter_model.safetensors: "),
        ("truncated", "truncated/adapter_model.safetensors: truncated"),
        ("dora", "use_dora"),
        ("team", "team/adapter_config.json"),
    ],
)
async def test_bad_sources_are_refused_and_nothing_changes(site: Site, adapter: str, says: str) -> None:
    before = await site.generation()
    for path in ("/admin/experts", "/admin/experts/validate"):
        got = await site.http.post(path, headers=ADMIN, json={"name": "new", "adapter": adapter})
        error = got.json()["error"]
        assert (got.status_code, error["param"]) == (400, "adapter"), got.text
        assert says in error["message"]
        assert str(site.root) not in got.text
    context = Context("the-admin")
    with pytest.raises(CallFailed):
        await site.methods.AddExpert(pb.PutExpertRequest(name="new", adapter=adapter), context)
    assert context.code is grpc.StatusCode.INVALID_ARGUMENT
    assert says in context.details
    assert (await site.generation(), "new" in await site.names()) == (before, False)


async def test_links_inside_a_root_are_fine(site: Site) -> None:
    assert (await site.add("new", "inner-link")).status_code == 201


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"name": "plain", "adapter": "team/good"}, 400, None),
        ({"name": "auto", "adapter": "team/good"}, 400, "name"),
        ({"name": "a/b", "adapter": "team/good"}, 400, "name"),
        ({"name": "new"}, 400, "adapter"),
        ({"name": "new", "adapter": "team/good", "force": True}, 400, "force"),
        ({"name": "new", "adapter": 5}, 400, "adapter"),
    ],
)
async def test_bad_bodies_are_refused_by_field(site: Site, body: Any, status: int, param: str | None) -> None:
    got = await site.http.post("/admin/experts", headers=ADMIN, json=body)
    assert (got.status_code, got.json()["error"]["param"]) == (status, param), got.text


async def test_unknown_experts_are_not_found(site: Site) -> None:
    put = await site.http.put("/admin/experts/nobody", headers=ADMIN, json={"adapter": "other"})
    assert (put.status_code, (await site.http.delete("/admin/experts/nobody", headers=ADMIN)).status_code) == (404, 404)


async def test_a_service_without_roots_takes_none() -> None:
    with pytest.raises(InvalidRequest, match="names no expert_roots"):
        Sources(()).expert("x")
    with pytest.raises(InvalidRequest, match="there is no folder /no/such/root"):
        Sources((Path("/no/such/root"),))
