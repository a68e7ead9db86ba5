"""docs/own-bank.md and the examples' clients, run as they stand there, with a tiny model in the place of a real one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from meteora_dist.bank import Bank
from meteora_dist.serving.local import Endpoints
from tests.docs.walk import ROOT, block, run, serving
from tests.support.tasks import write_tasks

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

PAGE = "docs/own-bank.md"
ADAPTERS = {"counting": "plain", "units": "partial"}


@pytest.fixture(scope="module")
def folder(ray_home: Path, tiny_base: Path, tiny_bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the reader stands: a checkout with a base model, adapters and data of their own."""
    here = tmp_path_factory.mktemp("reader")
    (here / "examples").symlink_to(ROOT / "examples")
    (here / "base").symlink_to(tiny_base)
    for name, ours in ADAPTERS.items():
        shutil.copytree(tiny_bank.path / "experts" / ours, here / "adapters" / name)
    write_tasks(here / "data", tuple(ADAPTERS))
    return here


@pytest.fixture(scope="module")
def built(folder: Path) -> str:
    return run(block(PAGE, "meteora bank build"), folder)


@pytest.fixture(scope="module")
def service(folder: Path, built: str) -> Iterator[Endpoints]:
    with serving(block(PAGE, "meteora serve", "--bank bank\n"), folder) as endpoints:
        yield endpoints


def test_a_bank_of_adapters_is_built(folder: Path, built: str) -> None:
    bank = Bank.open(folder / "bank")
    assert bank.names == tuple(ADAPTERS)
    assert set(bank.prototypes) == {True}
    assert "2 experts" in built


def test_an_adapter_is_asked_by_its_name(folder: Path, service: Endpoints) -> None:
    answer = json.loads(run(block(PAGE, "curl", '"counting"'), folder, service))
    assert answer["model"] == "counting"
    assert answer["usage"]["completion_tokens"] == 16


def test_openais_client(folder: Path, service: Endpoints) -> None:
    said = run("python examples/clients/openai_client.py http://127.0.0.1:8000/v1", folder, service)
    assert "experts: counting, units" in said
    for model in ("auto", "auto-sequence", "base", "counting", "counting:0.5,units:0.5"):
        assert f"\n{model}: " in said
    assert "(8 tokens)" in said
    assert "dominating expert: " in said
    assert "refused: model_not_found" in said


def test_grpc_client(folder: Path, service: Endpoints) -> None:
    said = run("python examples/clients/grpc_client.py 127.0.0.1:9000", folder, service)
    assert "top-2 of counting, units" in said
    assert "8 tokens" in said
    assert "refused: NOT_FOUND" in said


def test_gates_are_trained(folder: Path) -> None:
    small = " --set steps=2 --set dtype=float32 --set max_tokens=64"
    assert "2 experts" in run(block(PAGE, "meteora train gates").rstrip() + small, folder)
    bank = Bank.open(folder / "bank-trained")
    assert bank.names == tuple(ADAPTERS)
    assert set(bank.prototypes) == {False}
