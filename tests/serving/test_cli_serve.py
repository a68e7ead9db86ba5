"""``meteora serve`` as a process: it says where it listens, ends on a signal and leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from importlib import import_module
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from meteora_cluster.member import free_port
from meteora_dist.bank import Bank
from meteora_dist.serving.keys import key_digest, new_key
from meteora_dist.serving.proto.meteora.v1 import inference_pb2 as pb
from meteora_dist.serving.proto.meteora.v1.inference_pb2_grpc import InferenceStub

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

LONG = 600
GREEDY = pb.Sampling(temperature=0)


Serve = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts ``meteora serve``; what a failed test leaves running is ended after it."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, home: Path) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        command = [sys.executable, "-c", "from meteora_dist.cli.main import main; main()", "serve", *options]
        process = subprocess.Popen(
            command,
            env=environment | {"HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)


def test_it_serves_until_a_signal_and_leaves_nothing(
    serve: Serve, tiny_base: Path, tiny_bank: Bank, tmp_path: Path
) -> None:
    http, grpc = free_port(), free_port()
    config = tmp_path / "serve.yaml"
    app = {
        "name": "meteora",
        "import_path": "meteora_dist.serving.app:build",
        "args": {
            "model": "/none",
            "bank": str(tiny_bank.path),
            "max_model_len": 128,
            "kv_cache_tokens": 1024,
            "access": "open",
        },
    }
    config.write_text(yaml.safe_dump({"http_options": {"port": http}, "applications": [app]}))
    process = serve("--config", str(config), "--model", str(tiny_base), "--grpc-port", str(grpc), home=tmp_path)
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.strip())
        if "ready" in line:
            break
    assert f"HTTP  http://127.0.0.1:{http}/v1" in lines
    assert f"gRPC  127.0.0.1:{grpc}" in lines
    assert httpx.get(f"http://127.0.0.1:{http}/healthz").status_code == 200
    psutil = import_module("psutil")
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) > 3
    # As a terminal does it: everybody in the group gets the signal.
    os.killpg(process.pid, signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest.strip()) == (0, "stopped"), errors
    assert [child for child in children if child.is_running()] == []
    assert [path.name for path in tmp_path.iterdir()] == ["serve.yaml"]


def test_it_asks_for_keys_speaks_tls_and_ends_after_its_streams(
    serve: Serve, tiny_base: Path, tiny_bank: Bank, tmp_path: Path
) -> None:
    http, grpc_port, key = free_port(), free_port(), new_key()
    entry = {"name": "one", "sha256": key_digest(key), "max_live_requests": 2}
    (tmp_path / "keys.yaml").write_text(yaml.safe_dump([entry]))
    certificate, private = self_signed(tmp_path)
    app = {
        "name": "meteora",
        "import_path": "meteora_dist.serving.app:build",
        "args": {"model": str(tiny_base), "bank": str(tiny_bank.path), "max_model_len": LONG, "drain_s": 120},
    }
    options = {"port": http, "ssl_certfile": str(certificate), "ssl_keyfile": str(private)}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump({"http_options": options, "applications": [app]}))
    words = ["--config", str(tmp_path / "serve.yaml"), "--keys", str(tmp_path / "keys.yaml")]
    process = serve(*words, "--grpc-port", str(grpc_port), home=tmp_path)
    assert process.stdout is not None
    lines = [next(process.stdout).strip() for _ in range(4)]
    assert lines == [
        f"HTTP  https://127.0.0.1:{http}/v1",
        f"page  https://127.0.0.1:{http}/",
        f"gRPC  127.0.0.1:{grpc_port}",
        "ready; Ctrl-C ends it",
    ]
    with (
        httpx.Client(base_url=f"https://127.0.0.1:{http}", verify=_trusting(certificate), timeout=60) as client,
        grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as channel,
    ):
        assert client.post("/v1/completions", json={"prompt": "Hi"}).status_code == 401
        client.headers["Authorization"] = f"Bearer {key}"
        stub, metadata = InferenceStub(channel), [("authorization", f"Bearer {key}")]
        with pytest.raises(grpc.RpcError) as refused:
            stub.Generate(pb.GenerateRequest(prompt="Hi"))
        assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        # Each stream is over for the key's count of calls as soon as it is read: one after the other gets in.
        for _ in range(6):
            assert events(client, 2)[-1] == "[DONE]"
        call = stub.GenerateStream(pb.GenerateRequest(prompt="Hi", sampling=GREEDY), metadata=metadata)
        first = next(call).choice.text
        with client.stream("POST", "/v1/completions", json=body(LONG - 2)) as stream:
            received = stream.iter_lines()
            next(received)
            process.send_signal(signal.SIGTERM)
            assert "finishing what is under way, for 120 s at most" in next(process.stdout)
            while (late := client.post("/v1/completions", json=body(1))).status_code != 503:
                assert late.status_code == 429, "both calls of the key are under way"
            assert late.json()["error"]["code"] == "engine_unavailable"
            rest = [line for line in received if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in ("length", "stop")
        assert first + "".join(message.choice.text for message in call)
        assert call.code() == grpc.StatusCode.OK
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output.strip()) == (0, ""), errors


def body(tokens: int) -> dict[str, Any]:
    return {"prompt": "Hi", "stream": True, "temperature": 0, "max_tokens": tokens}


def events(client: httpx.Client, tokens: int) -> list[str]:
    with client.stream("POST", "/v1/completions", json=body(tokens)) as stream:
        assert stream.status_code == 200, stream.read()
        return [line.removeprefix("data: ") for line in stream.iter_lines() if line]


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "private.pem"
    paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
    paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return paths


def _trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate)


@pytest.mark.parametrize("fault", ["bank", "port"])
def test_what_cannot_work_is_said_in_one_line(
    fault: str, serve: Serve, tiny_base: Path, tiny_bank: Bank, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if fault == "port" else free_port()
        bank = tmp_path if fault == "bank" else tiny_bank.path
        options = ["--model", str(tiny_base), "--bank", str(bank), "--http-port", str(port)]
        process = serve(*options, "--grpc-port", str(free_port()), home=tmp_path)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    expected = f"error: port {port} is taken" if fault == "port" else f"error: {tmp_path / 'bank.json'}"
    assert errors.splitlines()[-1].startswith(expected)
    assert "Traceback" not in errors
