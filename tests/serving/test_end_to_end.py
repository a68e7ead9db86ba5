"""The whole service as a caller sees it: one Ray, one replica, two ranks, a tiny random model and four experts."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest
import ray
import torch
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from peft import PeftModel
from prometheus_client.parser import text_string_to_metric_families

from meteora_cluster.member import free_port
from meteora_dist.bank import Bank
from meteora_dist.client import Client, Usage
from meteora_dist.errors import ExpertNotFound
from meteora_dist.observability import metrics
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.local import Endpoints, running_service
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.proto.meteora.v1.inference_pb2_grpc import InferenceStub
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.support.tiny import load_tiny_llama

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

CONTEXT = 400
LIVE = 14
EXPERTS = ("plain", "wide", "rooted", "partial")
MODELS = ("auto", "auto-sequence", "base", *EXPERTS)
PROMPT = "Which expert answers?"
TOKENS = 12


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of generations."""
    return tmp_path_factory.mktemp("generations")


@pytest.fixture(scope="module")
def service(ray_home: Path, tiny_base: Path, tiny_bank: Bank, shared: Path) -> Iterator[Endpoints]:
    config = ServiceConfig(
        model=tiny_base,
        bank=tiny_bank.path,
        ep=2,
        max_model_len=CONTEXT,
        kv_cache_tokens=8192,
        access="open",
        max_live_requests=LIVE,
        max_waiting_requests=0,
        rebuild_wait_s=120,
        generations=shared,
        metrics_interval_s=0.5,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "1000")
        with running_service(config, free_port(), free_port()) as endpoints:
            yield endpoints


@pytest.fixture(scope="module")
def http(service: Endpoints) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.http, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def stub(service: Endpoints) -> Iterator[InferenceStub]:
    with grpc.insecure_channel(service.grpc) as channel:
        yield InferenceStub(channel)


@pytest.fixture(scope="module")
def client(service: Endpoints) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.http}/v1", api_key="unused", max_retries=0)


def greedy(http: httpx.Client, model: str, **more: Any) -> str:
    body = {"prompt": PROMPT, "model": model, "max_tokens": TOKENS, "temperature": 0} | more
    got = http.post("/v1/completions", json=body)
    assert got.status_code == 200, got.text
    return str(got.json()["choices"][0]["text"])


def reference(base: Path, bank: Bank, model: str) -> str:
    """What transformers and PEFT alone answer."""
    network: Any = load_tiny_llama(base)
    if model != "base":
        network = PeftModel.from_pretrained(network, bank.path / "experts" / model)
    tokenizer = TextTokenizer.open(base)
    ids = tokenizer.encode(PROMPT)
    produced = network.generate(input_ids=torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :]
    detokenizer = tokenizer.detokenizer(ids)
    return "".join(detokenizer.push(token) for token in produced.tolist()) + detokenizer.flush()


def test_it_is_healthy_and_lists_its_models(http: httpx.Client, client: openai.OpenAI) -> None:
    assert http.get("/healthz").status_code == 200
    assert tuple(model.id for model in client.models.list()) == MODELS


def test_it_says_that_it_serves_and_whose_call_it_was(service: Endpoints, http: httpx.Client) -> None:
    assert [http.get(path).status_code for path in ("/readyz", "/livez")] == [200, 200]
    assert http.get("/v1/models", headers={"x-request-id": "mine"}).headers.get_list("x-request-id") == ["mine"]
    with grpc.insecure_channel(service.grpc) as channel:
        health = HealthStub(channel)
        served = health.Check(HealthCheckRequest(service="meteora.v1.Inference"))
        with pytest.raises(grpc.RpcError) as refused:
            list(health.Watch(HealthCheckRequest()))
    assert served.status == HealthCheckResponse.SERVING
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_base_and_named_answers_are_those_of_transformers_and_peft(
    http: httpx.Client, tiny_base: Path, tiny_bank: Bank
) -> None:
    for model in MODELS[2:]:
        assert greedy(http, model) == reference(tiny_base, tiny_bank, model), model


def test_both_protocols_and_both_ways_give_the_same_answer(http: httpx.Client, stub: InferenceStub) -> None:
    whole = greedy(http, "auto")
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1]) == whole
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=TOKENS, sampling=pb.Sampling(temperature=0))
    unary = stub.Generate(request)
    assert (unary.choices[0].text, unary.choices[0].finish_reason) == (whole, pb.FINISH_REASON_LENGTH)
    messages = list(stub.GenerateStream(request))
    assert "".join(message.choice.text for message in messages) == whole
    assert messages[-1].usage == unary.usage == pb.Usage(prompt_tokens=len(PROMPT), completion_tokens=TOKENS)


def test_the_openai_client_chats_and_streams(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "wide",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_completion_tokens": 8,
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_our_own_client_says_the_same_over_both(service: Endpoints, http: httpx.Client) -> None:
    whole = greedy(http, "auto")
    for url in (service.http, f"grpc://{service.grpc}"):
        with Client(url) as ours:
            assert ours.models() == MODELS
            assert ours.generate(PROMPT, max_tokens=TOKENS, temperature=0).text == whole
            pieces = list(ours.stream(PROMPT, max_tokens=TOKENS, temperature=0))
            with pytest.raises(ExpertNotFound, match="no model 'nobody'"):
                ours.generate(PROMPT, model="nobody")
        assert "".join(piece.text for piece in pieces) == whole
        assert pieces[-1].usage == Usage(len(PROMPT), TOKENS)


def test_a_mixed_batch_answers_as_each_request_alone(http: httpx.Client) -> None:
    alone = {model: greedy(http, model) for model in MODELS}
    # The vote's answer is that of the expert it picks.
    assert alone["auto-sequence"] in {alone[expert] for expert in EXPERTS}
    assert len(set(alone.values())) == len(MODELS) - 1
    with ThreadPoolExecutor(2 * len(MODELS)) as pool:
        together = list(pool.map(lambda model: (model, greedy(http, model)), 2 * MODELS))
    assert [text for model, text in together] == [alone[model] for model, text in together]


def test_traces_sum_to_one_name_the_expert_and_agree(http: httpx.Client, stub: InferenceStub) -> None:
    for model in MODELS:
        body = {"prompt": PROMPT, "model": model, "max_tokens": 4, "temperature": 0, "routing": {"trace": True}}
        routing = http.post("/v1/completions", json=body).json()["choices"][0]["routing"]
        assert tuple(routing["experts"]) == EXPERTS
        sums = [sum(token["shares"]) for token in routing["tokens"]]
        assert sums == pytest.approx([0.0 if model == "base" else 1.0] * 4, abs=1e-5)
        if model in ("base", *EXPERTS):
            assert routing["dominating"] == (None if model == "base" else model)
        request = pb.GenerateRequest(
            prompt=PROMPT,
            model=model,
            max_tokens=4,
            sampling=pb.Sampling(temperature=0),
            routing=pb.Routing(trace=True),
        )
        trace = stub.Generate(request).choices[0].routing
        for token, other in zip(trace.tokens, routing["tokens"], strict=True):
            assert (token.token, token.id) == (other["token"], other["id"])
            assert list(token.shares) == pytest.approx(other["shares"], abs=1e-5)


def test_stop_texts_and_seeds_work(http: httpx.Client) -> None:
    text = greedy(http, "base")
    stop = text[3:5]
    assert greedy(http, "base", stop=stop) == text[: text.index(stop)]
    drawn = {seed: [greedy(http, "auto", temperature=1.0, seed=seed) for _ in range(2)] for seed in (1, 2)}
    assert drawn[1][0] == drawn[1][1]
    assert drawn[1][0] != drawn[2][0]


def test_bad_requests_are_refused_and_it_keeps_serving(
    http: httpx.Client, client: openai.OpenAI, stub: InferenceStub
) -> None:
    with pytest.raises(openai.NotFoundError, match="served are auto, auto-sequence, base") as missing:
        client.completions.create(model="nobody", prompt="Hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=f"holds {CONTEXT} tokens.*{CONTEXT + 1} of the prompt") as long:
        client.completions.create(model="auto", prompt="x" * (CONTEXT + 1))
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="max_tokens is -1"):
        client.completions.create(model="auto", prompt="Hi", max_tokens=-1)
    assert http.post("/v1/completions", content=b"{").status_code == 400
    assert http.get("/v1/nowhere").json()["error"]["type"] == "invalid_request_error"
    for request, code in (
        (pb.GenerateRequest(prompt="Hi", model="nobody"), grpc.StatusCode.NOT_FOUND),
        (pb.GenerateRequest(prompt="x" * (CONTEXT + 1)), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(prompt="Hi", max_tokens=-1), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT),
    ):
        for call in (stub.Generate, lambda request: list(stub.GenerateStream(request))):
            with pytest.raises(grpc.RpcError) as refused:
                call(request)
            assert refused.value.code() == code
            assert not any(word in refused.value.details() for word in ("Traceback", "/", "pid="))
    assert greedy(http, "auto")


def test_experts_are_listed(stub: InferenceStub) -> None:
    got = stub.ListExperts(pb.ListExpertsRequest())
    assert tuple(expert.name for expert in got.experts) == EXPERTS


def test_callers_who_go_away_make_room(service: Endpoints, http: httpx.Client, stub: InferenceStub) -> None:
    body = {"prompt": "Hi", "max_tokens": CONTEXT - 2, "stream": True, "temperature": 0}
    streams: list[Iterator[str]] = []
    with contextlib.ExitStack() as callers:
        for _ in range(LIVE // 2):
            client = callers.enter_context(httpx.Client(base_url=service.http, timeout=60))
            stream = callers.enter_context(client.stream("POST", "/v1/completions", json=body))
            # An iterator that is dropped closes its connection.
            streams.append(stream.iter_lines())
            next(streams[-1])
        calls = [
            stub.GenerateStream(pb.GenerateRequest(prompt="Hi", sampling=pb.Sampling(temperature=0)))
            for _ in range(LIVE - LIVE // 2)
        ]
        for call in calls:
            next(call)
        full = http.post("/v1/completions", json={"prompt": "Hi"})
        with pytest.raises(grpc.RpcError) as refused:
            stub.Generate(pb.GenerateRequest(prompt="Hi"))
        for call in calls:
            call.cancel()
    assert (full.status_code, full.json()["error"]["code"]) == (429, "overloaded")
    assert int(full.headers["retry-after"]) >= 1
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    # All of them together would still take many seconds to finish on their own.
    freed = time.monotonic()
    while http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1}).status_code == 429:
        assert time.monotonic() - freed < 3
        time.sleep(0.05)


@pytest.mark.parametrize("announced", [True, False])
def test_a_huge_body_is_refused_quickly(announced: bool, service: Endpoints) -> None:
    megabyte = b" " * 2**20
    headers = {"Content-Length": str(100 * 2**20)} if announced else {}
    before = _peak_mib()
    began = time.monotonic()
    with httpx.Client(base_url=service.http, timeout=60) as client:
        got = client.post("/v1/completions", content=itertools.repeat(megabyte, 100), headers=headers)
    assert (got.status_code, got.json()["error"]["code"]) == (413, "body_too_large")
    assert time.monotonic() - began < 10
    # Of a body that does not say how long it is, Serve's proxy has what came before our answer: any amount, in a test.
    assert not announced or _peak_mib() - before < 30


def test_a_huge_message_is_refused_by_the_proxy_itself(stub: InferenceStub) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.Generate(pb.GenerateRequest(prompt="x" * (100 * 2**20)))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in refused.value.details()


def test_nothing_but_the_methods_of_the_proto_can_be_called(service: Endpoints) -> None:
    with grpc.insecure_channel(service.grpc) as channel:
        for path in (
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            "/meteora.v1.Inference/drain",
            "/meteora.v1.Inference/__init__",
            "/meteora.v1.Inference/check_health",
        ):
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(path)(b"")
            assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED, path
        garbage = channel.unary_unary("/meteora.v1.Inference/Generate")
        with pytest.raises(grpc.RpcError) as refused:
            garbage(b"\xff\xff\xff")
        assert not any(word in refused.value.details() for word in ("Traceback", "site-packages", "pid="))


def test_callers_cannot_talk_serve_out_of_hearing_them_leave(service: Endpoints, http: httpx.Client) -> None:
    """Serve has a header that makes it deaf to disconnects; a stream is watched by the application as well."""
    body = {"prompt": "Hi", "max_tokens": CONTEXT - 2, "stream": True, "temperature": 0}
    with contextlib.ExitStack() as callers:
        for _ in range(LIVE):
            client = callers.enter_context(httpx.Client(base_url=service.http, timeout=60))
            headers = {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "0"}
            stream = callers.enter_context(client.stream("POST", "/v1/completions", json=body, headers=headers))
            lines = stream.iter_lines()
            next(lines)
            callers.callback(lines.close)
        assert http.post("/v1/completions", json={"prompt": "Hi"}).status_code == 429
    left = time.monotonic()
    while http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1}).status_code == 429:
        assert time.monotonic() - left < 3
        time.sleep(0.05)


def test_a_lost_rank_is_a_pause(http: httpx.Client, stub: InferenceStub) -> None:
    long: dict[str, Any] = {"max_tokens": 150, "temperature": 1.0, "seed": 8}
    undisturbed = greedy(http, "auto", **long)
    body = {"prompt": PROMPT, "stream": True, "stream_options": {"include_usage": True}} | long
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=150, sampling=pb.Sampling(temperature=1.0, seed=8))
    live = stub.GenerateStream(request)
    texts = [next(live).choice.text]
    with http.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        chunks = [_chunk(next(line for line in lines if line))]
        os.kill(_rank_pids()[1], signal.SIGKILL)
        _await_health(http, 503)
        # Asked in the middle of the rebuild, and answered after it.
        assert greedy(http, "auto", **long) == undisturbed
        chunks += [_chunk(line) for line in lines if line and "[DONE]" not in line]
    messages = list(live)
    assert "".join([*texts, *(message.choice.text for message in messages)]) == undisturbed
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == undisturbed
    usage = chunks[-1]["usage"]
    assert usage["prompt_tokens"] == messages[-1].usage.prompt_tokens == len(PROMPT)
    assert usage["completion_tokens"] == messages[-1].usage.completion_tokens == 150
    assert http.get("/healthz").status_code == 200


def test_ray_exports_every_metric_and_no_log_has_a_text(http: httpx.Client, stub: InferenceStub, shared: Path) -> None:
    """After a rank was lost, which some metrics are about, and when everything else has happened, too."""
    text = greedy(http, "auto")
    stub.Generate(pb.GenerateRequest(prompt=PROMPT, max_tokens=TOKENS, sampling=pb.Sampling(temperature=0)))
    assert http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": -1}).status_code == 400
    with pytest.raises(grpc.RpcError):
        stub.Generate(pb.GenerateRequest(prompt=PROMPT, max_tokens=-1))
    (shared / "replica-odd.json").write_text("{}")
    wanted = {name: set(metric.labels) for metric in metrics.METRICS for name in metric.exported}
    deadline = time.monotonic() + 30
    while missing := wanted.keys() - (exported := _exported()).keys():
        assert time.monotonic() < deadline, f"not exported: {sorted(missing)}"
        time.sleep(0.5)
    (shared / "replica-odd.json").unlink()
    for name, labels in wanted.items():
        assert exported[name] >= labels | {"application", "deployment", "replica"}, name
    assert {name for name in exported if "_meteora_" in name} == wanted.keys()
    logs = list(_logs())
    assert any('"message": "request"' in log and '"protocol": "grpc"' in log for log in logs)
    assert len(text) > TOKENS // 2
    assert not [log for log in logs if any(said in log for said in (PROMPT, text, json.dumps(text)[1:-1]))]


def _exported() -> dict[str, set[str]]:
    """Labels of everything that Ray's agent exports, by name."""
    (node,) = ray.nodes()
    page = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", trust_env=False)
    families = text_string_to_metric_families(page.text)
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def _logs() -> Iterator[str]:
    """What each process of the service has logged."""
    session = import_module("ray._private.worker")._global_node.get_session_dir_path()
    for file in Path(session, "logs").rglob("*"):
        if file.is_file():
            yield file.read_text(errors="replace")


def _chunk(line: str) -> dict[str, Any]:
    chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
    return chunk


def _rank_pids() -> list[int]:
    psutil = import_module("psutil")
    processes = psutil.Process().children(recursive=True)
    return [process.pid for process in processes if any("ray::RankActor" in word for word in process.cmdline())]


def _peak_mib() -> float:
    """The most memory that proxy and replica have had."""
    processes = import_module("psutil").Process().children(recursive=True)
    named = [p.pid for p in processes if any(n in " ".join(p.cmdline()) for n in ("ProxyActor", "ServeReplica"))]
    assert len(named) == 2, named
    peaks = [re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()) for pid in named]
    return sum(int(peak[1]) for peak in peaks if peak) / 1024


def _await_health(http: httpx.Client, status: int) -> None:
    deadline = time.monotonic() + 120
    while http.get("/healthz").status_code != status:
        assert time.monotonic() < deadline, f"/healthz did not become {status}"
        time.sleep(0.05)
