"""What the README and docs/client.md show is run as it stands there, against the demo bank on two ranks."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from meteora_cluster.member import free_port
from meteora_dist.serving.config_file import read_serve_file
from meteora_dist.serving.local import Endpoints, running_service

pytestmark = [pytest.mark.ray, pytest.mark.demo_model, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CLIENT = (ROOT / "docs" / "client.md").read_text()


def blocks(language: str, text: str) -> list[str]:
    """The code blocks of a language in a text."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def service(ray_home: Path, demo_model: Path) -> Iterator[Endpoints]:
    """What ``make serve`` starts, on ports that are free."""
    config = read_serve_file(ROOT / "serve_config.yaml").service
    update = {"model": demo_model, "bank": ROOT / "examples" / "bank"}
    with running_service(config.model_copy(update=update), free_port(), free_port()) as endpoints:
        yield endpoints


def here(code: str, service: Endpoints) -> str:
    """The code, calling the service of this test."""
    moved = code.replace("http://127.0.0.1:8000", service.http).replace("127.0.0.1:9000", service.grpc)
    assert moved != code, "the README's code must call the service"
    return moved


def test_curl(service: Endpoints) -> None:
    (command,) = (block for block in blocks("bash", README) if "curl" in block)
    done = subprocess.run(["bash", "-c", here(command, service)], capture_output=True, text=True, timeout=120)
    answer = httpx.Response(200, content=done.stdout).json()
    choice = answer["choices"][0]
    assert choice["message"]["content"].strip()
    assert choice["routing"]["dominating"] == "object_counting"


@pytest.mark.parametrize("code", blocks("python", README) + blocks("python", CLIENT), ids=lambda code: code.split()[1])
def test_python_clients(service: Endpoints, code: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(here(code, service), "README.md", "exec"), {})
    assert printed.getvalue().strip()


def test_every_make_target_and_command_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", README + (ROOT / "examples" / "README.md").read_text()):
        assert any((home / path).exists() for home in (ROOT, ROOT / "examples")), path
