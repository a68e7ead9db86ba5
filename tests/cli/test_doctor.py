"""``meteora doctor``: each condition it must find is produced, for real where this machine can."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from meteora_dist.bank import Bank
from meteora_dist.cli.doctor.installation import check_packages, check_torch, check_triton
from meteora_dist.cli.doctor.place import check_bank, check_model, check_port, check_ray_token, check_shared_memory
from tests.support.shell import Shell


@pytest.fixture
def gpu_devices(tmp_path: Path) -> Path:
    """What the system shows of one NVIDIA GPU."""
    for name in ("nvidia0", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.mark.skipif(torch.version.cuda is not None, reason="needs a CPU build of torch")
def test_a_cpu_build_of_torch_beside_a_gpu(gpu_devices: Path, tmp_path: Path) -> None:
    found = check_torch(gpu_devices)
    assert found.status == "failure"
    assert found.what == f"torch {torch.__version__}, built for the CPU, but this machine has 1 NVIDIA GPU(s)"
    assert "CUDA build of torch" in found.fix
    assert check_torch(tmp_path / "none").status == "ok"


def test_a_cuda_build_that_does_not_fit_the_gpu(gpu_devices: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = check_torch(gpu_devices)
    assert (found.status, "update the driver" in found.fix) == ("failure", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    found = check_torch(gpu_devices)
    assert found.status == "failure"
    assert "has no code for this GPU (sm_70), only for sm_80, sm_90" in found.what
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert check_torch(gpu_devices).status == "ok"


def test_triton_is_missing_where_there_is_a_gpu(
    gpu_devices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    found = check_triton(gpu_devices)
    assert (found.status, found.fix.startswith("pip install 'triton")) == ("failure", True)
    assert check_triton(tmp_path / "none").status == "ok"


def test_packages_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_packages().status == "ok"
    version = importlib.metadata.version

    def other(name: str) -> str:
        if name == "httpx":
            raise importlib.metadata.PackageNotFoundError(name)
        return "5.22.1" if name == "transformers" else version(name)

    monkeypatch.setattr(importlib.metadata, "version", other)
    found = check_packages()
    assert found.status == "failure"
    assert "httpx is missing" in found.what
    assert "transformers 5.22.1 is installed, <5.24,>=5.23 is needed" in found.what


def test_no_model(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METEORA_CACHE", str(tmp_path))
    found = check_model(None)
    assert (found.status, found.fix.split(",")[0]) == ("failure", "meteora fetch-demo")
    assert check_model(tmp_path / "none").status == "failure"
    assert check_model(tiny_base).status == "ok"


def test_a_flipped_byte_of_the_bank(tiny_bank: Bank, tiny_base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bank"
    shutil.copytree(tiny_bank.path, copy)
    assert check_bank(copy, tiny_base).status == "ok"
    weights = copy / "experts/plain/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = check_bank(copy, tiny_base)
    assert found.status == "failure"
    assert "experts/plain: the adapter's digest is " in found.what
    assert f"meteora bank validate {copy}" in found.fix


def test_a_port_in_use(taken: int) -> None:
    found = check_port(taken, "grpc")
    assert (found.status, found.what) == ("failure", f"{taken} is in use")
    assert "--grpc-port" in found.fix


class TestRayToken:
    @pytest.fixture
    def home(self, tmp_path: Path) -> Path:
        (tmp_path / ".ray").mkdir()
        return tmp_path

    def test_a_file_and_a_variable_that_differ(self, home: Path) -> None:
        (home / ".ray" / "auth_token").write_text("one\n")
        found = check_ray_token({"HOME": str(home), "RAY_AUTH_TOKEN": "two"})
        assert found.status == "failure"
        assert "different tokens" in found.what
        assert f"rm {home}/.ray/auth_token" in found.fix
        same = {"HOME": str(home), "RAY_AUTH_TOKEN": "one", "RAY_AUTH_MODE": "token"}
        assert check_ray_token(same).status == "ok"

    def test_two_files_that_differ(self, home: Path) -> None:
        (home / ".ray" / "auth_token").write_text("one")
        (home / "other").write_text("two")
        named = {"HOME": str(home), "RAY_AUTH_TOKEN_PATH": str(home / "other")}
        assert "different tokens" in check_ray_token(named).what
        (home / "other").unlink()
        assert "cannot be read" in check_ray_token(named).what

    def test_a_mode_and_a_token_that_do_not_go_together(self, home: Path) -> None:
        assert check_ray_token({"HOME": str(home), "RAY_AUTH_MODE": "token"}).status == "failure"
        assert check_ray_token({"HOME": str(home)}).status == "ok"
        (home / ".ray" / "auth_token").write_text("one")
        assert check_ray_token({"HOME": str(home), "RAY_AUTH_MODE": "disabled"}).status == "warning"
        assert "every `ray start`" in check_ray_token({"HOME": str(home)}).what
        (home / ".ray" / "auth_token").write_text("")
        assert "holds no token" in check_ray_token({"HOME": str(home)}).what


def test_little_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=64 * 2**20))
    found = check_shared_memory(tmp_path)
    assert (found.status, found.what) == ("warning", f"64 MiB are free in {tmp_path}")
    assert check_shared_memory(tmp_path / "none").status == "failure"


def test_the_command(
    tiny_bank: Bank,
    tiny_base: Path,
    taken: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shell = Shell(monkeypatch, capfd)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    words = ["doctor", "--model", tiny_base, "--bank", tiny_bank.path, "--grpc-port", free]
    said = shell(*words, "--http-port", taken)
    assert said.code == 1
    assert f"✗ http port     {taken} is in use\n                fix: end what listens there" in said.out
    found = json.loads(shell(*words, "--http-port", taken, "--json").out)
    assert [one["check"] for one in found if one["status"] == "failure"] == ["http port"]
    assert shell(*words, "--http-port", free).code == 0
