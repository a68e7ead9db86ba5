"""What docs/security.md promises of keys and of what callers learn, over HTTP and gRPC alike where both have it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
import yaml

from meteora_dist.errors import AdapterError, BankError
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.grpc_api import CallFailed
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.http_guard import PROBES
from meteora_dist.serving.keys import key_digest
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.service import TextService
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.asking import Ask, Context, P, ask_grpc, ask_http, bearer, both, grpc_of, http_of
from tests.serving.conftest import MakeService
from tests.serving.scripted import ScriptedEngine, says

ROOT = Path(__file__).parents[2]


@both
async def test_only_a_known_key_is_answered(over: Callable[[TextService], Ask], guarded: TextService) -> None:
    ask = over(guarded)
    assert await ask("all") == ("yes", "")
    assert await ask(None) == ("invalid_api_key", "an API key is needed: send it as 'Authorization: Bearer KEY'")
    assert await ask("al") == ("invalid_api_key", "this API key is not known here")
    assert await ask(key_digest("all")) == ("invalid_api_key", "this API key is not known here")


async def test_every_route_but_the_probes_needs_a_key(guarded: TextService) -> None:
    http = http_of(guarded)
    api = create_api(guarded)
    paths = {route.path for route in api.routes if hasattr(route, "path")} | {"/nowhere", "/healthz/", "//healthz"}
    assert {"/v1/models", P, "/openapi.json", *PROBES} <= paths
    for path in sorted(paths - PROBES):
        for method in ("GET", "POST", "OPTIONS"):
            got = await http.request(method, path.replace("{name}", "wide"))
            assert got.status_code == 401, path
            assert got.headers["www-authenticate"] == 'Bearer realm="meteora"'
            assert got.json()["error"]["type"] == "invalid_request_error"
    assert [(await http.get(path)).status_code for path in PROBES] == [200] * 3
    context = Context()
    with pytest.raises(CallFailed):
        await grpc_of(guarded).ListExperts(pb.ListExpertsRequest(), context)
    assert context.code == grpc.StatusCode.UNAUTHENTICATED


@both
async def test_a_key_is_held_to_its_models(over: Callable[[TextService], Ask], guarded: TextService) -> None:
    ask = over(guarded)
    assert await ask("wide", model="wide") == await ask("wide", model="base") == ("yes", "")
    for model in ("plain", "auto", "nobody"):
        assert await ask("wide", model=model) == ("permission_denied", f"this API key may not use the model '{model}'")
    assert (await ask("wide"))[0] == "permission_denied", "the default model is auto"


async def test_every_way_to_say_it_is_held_to_the_models(guarded: TextService) -> None:
    ask, rpc = ask_http(guarded), ask_grpc(guarded)
    for routing in ({"mode": "auto"}, {"mode": "auto-sequence"}, {"experts": [{"name": "plain"}]}):
        assert (await ask("wide", routing=routing))[0] == "permission_denied", routing
    blend = [{"name": "wide", "weight": 1.0}, {"name": "plain", "weight": 0.5}]
    assert (await ask("wide", routing={"mode": "blend", "experts": blend}))[0] == "permission_denied"
    assert (await ask("wide", model="wide:0.5,plain:0.5"))[0] == "permission_denied"
    assert (await rpc("wide", routing=pb.Routing(mode=pb.MODE_AUTO_SEQUENCE)))[0] == "permission_denied"
    assert (await rpc("wide", routing=pb.Routing(experts=[pb.ChosenExpert(name="plain")])))[0] == "permission_denied"
    assert await ask("wide", model="wide:0.5") == await ask("wide", routing={"mode": "base"}) == ("yes", "")


async def test_a_trace_shows_no_expert_that_the_key_may_not_use(guarded: TextService) -> None:
    body = {"prompt": "Hi", "model": "wide", "max_tokens": 1, "routing": {"trace": True}}
    for key, experts, shares in (
        ("wide", ["wide"], [0.6]),
        ("all", ["plain", "wide", "rooted", "partial"], [0.1, 0.6, 0.2, 0.1]),
    ):
        got = (await http_of(guarded).post(P, headers=bearer(key), json=body)).json()["choices"][0]["routing"]
        assert (got["experts"], got["tokens"][0]["shares"], got["dominating"]) == (experts, shares, "wide")
    layers = body | {"routing": {"trace": "layers"}}
    got = (await http_of(guarded).post(P, headers=bearer("wide"), json=layers)).json()["choices"][0]["routing"]
    # The second of the three layers is another expert's, whom this key may not see; the third is nobody's.
    assert (got["experts"], got["tokens"][0]["layer_experts"]) == (["wide"], [0, -1, -1])
    assert got["tokens"][0]["layer_shares"] == [0.75, 0.0, 0.0]


async def test_a_key_sees_its_models_alone(guarded: TextService) -> None:
    http = http_of(guarded)
    listed = (await http.get("/v1/models", headers=bearer("wide"))).json()["data"]
    assert [model["id"] for model in listed] == ["base", "wide"]
    assert (await http.get("/v1/models/wide", headers=bearer("wide"))).status_code == 200
    assert (await http.get("/v1/models/plain", headers=bearer("wide"))).status_code == 403
    experts = (await grpc_of(guarded).ListExperts(pb.ListExpertsRequest(), Context("wide"))).experts
    assert [expert.name for expert in experts] == ["wide"]


@both
async def test_rate_and_concurrency_of_a_key_are_limited(
    over: Callable[[TextService], Ask], tokenizer: TextTokenizer, make_service: MakeService, gate: Gate
) -> None:
    engine = dataclasses.replace(says(tokenizer, "yes"), pause=asyncio.Event())
    ask = over(make_service(engine, gate=gate, max_waiting_requests=5))
    running = asyncio.ensure_future(ask("single"))
    while not engine.seen:
        await asyncio.sleep(0.01)
    code, message = await ask("single")
    assert (code, "max_live_requests of this API key is 1" in message) == ("rate_limit_exceeded", True)
    assert engine.pause is not None
    engine.pause.set()
    assert await running == await ask("single") == await ask("slow") == await ask("slow") == ("yes", "")
    code, message = await ask("slow")
    assert (code, "requests_per_minute of this API key is 2" in message) == ("rate_limit_exceeded", True)


async def test_a_limited_key_is_told_when_to_try_again(guarded: TextService) -> None:
    http = http_of(guarded)
    for _ in range(2):
        await http.get("/v1/models", headers=bearer("slow"))
    got = await http.get("/v1/models", headers=bearer("slow"))
    assert (got.status_code, got.headers["retry-after"]) == (429, "30")
    assert got.json()["error"]["type"] == "rate_limit_error"


LEAKS = ("Traceback", "/srv", 'File "', "0x", "10.0.0.1", "pid=", "site-packages", str(ROOT))


@both
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("/srv/secret at 10.0.0.1"),
        BankError(Path("/srv/secret"), "gate digest"),
        AdapterError(Path("/srv/secret"), "no header"),
        OSError(2, "No such file", "/srv/secret"),
        KeyError("/srv/secret"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_faults_of_ours_tell_nothing(
    over: Callable[[TextService], Ask], error: Exception, make_service: MakeService
) -> None:
    code, message = await over(make_service(ScriptedEngine([], error=error)))(None)
    assert code == "internal_error"
    assert not [leak for leak in LEAKS if leak in message]


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"\xff",
        b"[" * 99999,
        b'{"prompt": 5}',
        b'{"prompt": "a", "model": "../../etc/passwd"}',
        b'{"prompt":"\\ud800"}',
    ],
)
async def test_bodies_that_are_wrong_tell_nothing(body: bytes, guarded: TextService) -> None:
    got = await http_of(guarded).post(P, content=body, headers=bearer("all"))
    assert 400 <= got.status_code < 500, got.text
    assert not [leak for leak in LEAKS if leak in got.text]


def test_reflection_is_off_and_access_is_said_aloud() -> None:
    file = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    assert file["grpc_options"]["enable_reflection"] is False
    assert file["applications"][0]["args"]["access"] == "open"
    assert file["http_options"]["host"] == "127.0.0.1"
    assert "enable_reflection=False" in (ROOT / "meteora_dist" / "serving" / "local.py").read_text()
