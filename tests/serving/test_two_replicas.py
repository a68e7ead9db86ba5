"""Two replicas that Ray Serve runs share one bank: whichever is asked, and whatever becomes of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray.serve import Application

from meteora_cluster.member import free_port
from meteora_dist.bank import Bank
from meteora_dist.serving import local
from meteora_dist.serving.app import application
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.keys import key_digest
from meteora_dist.serving.local import running_service
from meteora_dist.serving.server import Server
from tests.serving.counting import CountingRank
from tests.support.tiny import SPECS, Spec, write_adapter

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

PATIENCE_S = 90
CALLS = 20
"""Serve spreads calls at random: that many reach both replicas, but for once in half a million."""


class CountingServer(Server):
    """A replica whose ranks count instead of running a model."""

    member = CountingRank  # type: ignore[assignment]


@pytest.fixture(scope="module")
def http(ray_home: Path, tiny_base: Path, tiny_bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("adapters")
    for seed in range(4):
        write_adapter(tiny_base, root / f"adapter-{seed}", Spec(2, 4), seed=seed)
    keys = root / "keys.yaml"
    keys.write_text(json.dumps([{"name": "boss", "sha256": key_digest("the-admin"), "role": "admin"}]))
    config = ServiceConfig(
        model=tiny_base,
        bank=tiny_bank.path,
        generations=root / "generations",
        generations_poll_s=0.2,
        expert_roots=(root,),
        keys_file=keys,
        replica_cpus=0.1,
        rank_cpus=0.2,
    )

    def twice(config: ServiceConfig, server: type[Server]) -> Application:
        app = application(config, server)
        app._bound_deployment._deployment_config.num_replicas = 2
        return app

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "application", twice)
        with running_service(config, free_port(), free_port(), server=CountingServer) as endpoints:
            yield httpx.Client(base_url=endpoints.http, headers={"Authorization": "Bearer the-admin"}, timeout=60)


def settled(http: httpx.Client, generation: int) -> list[str]:
    """The names of two replicas, once both serve this generation."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        got = http.get("/admin/experts")
        found = [(one["generation"], one["state"]) for one in got.json().get("replicas", [])]
        if found == [(generation, "serving")] * 2:
            return [one["replica"] for one in got.json()["replicas"]]
        time.sleep(0.1)
    raise AssertionError(got.text)


def models(http: httpx.Client) -> set[tuple[str, ...]]:
    """The experts in the answers of both replicas."""
    return {tuple(one["id"] for one in http.get("/v1/models").json()["data"])[3:] for _ in range(CALLS)}


def test_changes_reach_both_and_of_two_at_once_one_is_made(http: httpx.Client) -> None:
    first = settled(http, 1)
    assert len(set(first)) == 2
    assert http.post("/admin/experts", json={"name": "new", "adapter": "adapter-0"}).json()["generation"] == 2
    settled(http, 2)
    assert models(http) == {(*SPECS, "new")}

    def replace(seed: int) -> httpx.Response:
        return http.put("/admin/experts/new", json={"adapter": f"adapter-{seed}", "generation": 2})

    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(replace, range(1, 4)))
    assert sorted(answer.status_code for answer in answers) == [200, 409, 409], [answer.text for answer in answers]
    for answer in answers:
        assert answer.status_code == 200 or answer.json()["error"]["code"] == "stale_generation"
    settled(http, 3)
    digests = {http.get("/admin/experts").json()["experts"][-1]["digest"] for _ in range(CALLS)}
    assert len(digests) == 1


@pytest.mark.slow
def test_a_replica_that_is_killed_comes_back_with_the_newest(http: httpx.Client) -> None:
    generation = http.get("/admin/experts").json()["generation"]
    if "new" not in http.get("/admin/experts").text:
        http.post("/admin/experts", json={"name": "new", "adapter": "adapter-0"})
        generation += 1
    before = settled(http, generation)
    (name, *_) = [one["name"] for one in ray.util.list_named_actors(True) if one["name"].startswith("SERVE_REPLICA")]
    ray.kill(ray.get_actor(name, namespace="serve"))
    # Changes go on beside it; a call that was on its way to it is lost.
    deadline = time.monotonic() + PATIENCE_S
    while (
        got := http.delete(f"/admin/experts/new?generation={generation}")
    ).status_code >= 500 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert got.status_code == 200, got.text
    after = settled(http, generation + 1)
    assert len(set(after) - set(before)) == 1
    assert models(http) == {tuple(SPECS)}
