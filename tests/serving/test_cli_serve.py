"""``meteora serve`` as a process: it says where it listens, ends on a signal and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import httpx
import pytest
import yaml

from meteora_cluster.member import free_port
from meteora_dist.bank import Bank

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


def serve(*options: str, home: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", "from meteora_dist.cli.main import main; main()", "serve", *options]
    return subprocess.Popen(
        command,
        env=environment | {"HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_it_serves_until_a_signal_and_leaves_nothing(tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
    http, grpc = free_port(), free_port()
    config = tmp_path / "serve.yaml"
    app = {
        "name": "meteora",
        "import_path": "meteora_dist.serving.app:build",
        "args": {"model": "/none", "bank": str(tiny_bank.path), "max_model_len": 128, "kv_cache_tokens": 1024},
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


@pytest.mark.parametrize("fault", ["bank", "port"])
def test_what_cannot_work_is_said_in_one_line(fault: str, tiny_base: Path, tiny_bank: Bank, tmp_path: Path) -> None:
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
