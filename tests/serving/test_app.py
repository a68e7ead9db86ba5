"""The Serve application and its configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from meteora_dist.errors import InvalidRequest
from meteora_dist.serving.app import build
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.config_file import read_serve_file, unknown_keys
from meteora_dist.serving.local import SERVICERS

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "serve_config.yaml"


def test_the_placement_follows_from_the_mesh() -> None:
    app = build({"model": "m", "bank": "b", "ep": 3, "replica_cpus": 0.5, "rank_cpus": 1, "rank_gpus": 1})
    config = app._bound_deployment._replica_config
    assert config.placement_group_bundles == [{"CPU": 1.5, "GPU": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}]
    assert config.ray_actor_options["num_cpus"] == 0.5


def test_every_fault_in_the_args_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"bank: Field required; ep: .*greater than 0; epp: Extra inputs"):
        build({"model": "m", "ep": 0, "epp": 2})


def test_standby_is_refused_with_gpus() -> None:
    with pytest.raises(InvalidRequest, match="standby is for ranks without GPUs"):
        build({"model": "m", "bank": "b", "standby": True, "rank_gpus": 1})


def test_paths_are_absolute_with_home_and_variables_filled_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("BANKS", "/banks")
    config = ServiceConfig(model=Path("~/model"), bank=Path("$BANKS/one"))
    assert (config.model, config.bank) == (Path("/home/me/model"), Path("/banks/one"))
    assert ServiceConfig(model=Path("model"), bank=Path("b")).model == tmp_path / "model"


def test_the_shipped_file_deploys_two_ranks_on_two_cpus() -> None:
    file = read_serve_file(CONFIG)
    assert (file.http_port, file.grpc_port, file.service.ep) == (8000, 9000, 2)
    assert file.service.bank == Path.cwd() / "examples" / "bank"
    assert file.service.replica_cpus + 2 * file.service.rank_cpus <= 2
    assert yaml.safe_load(CONFIG.read_text())["grpc_options"]["grpc_servicer_functions"] == list(SERVICERS)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda file: file.update(grpc_option={}), "grpc_option"),
        (lambda file: file["http_options"].update(prt=1), "http_options.prt"),
        (lambda file: file["grpc_options"].update(reflection=False), "grpc_options.reflection"),
        (lambda file: file["applications"][0].update(routeprefix="/"), "applications.0.routeprefix"),
        (
            lambda file: file["applications"][0].update(deployments=[{"name": "meteora", "max_ongoing_request": 1}]),
            "applications.0.deployments.0.max_ongoing_request",
        ),
    ],
)
def test_keys_that_serve_would_pass_over_are_refused(change: Any, key: str, tmp_path: Path) -> None:
    content = yaml.safe_load(CONFIG.read_text())
    assert list(unknown_keys(content)) == []
    change(content)
    assert list(unknown_keys(content)) == [key]
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InvalidRequest, match=f"unknown keys {key}"):
        read_serve_file(path)


def test_files_that_deploy_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text("applications: [{name: a, import_path: 'other:app'}]")
    with pytest.raises(InvalidRequest, match="one application, with import_path meteora_dist"):
        read_serve_file(path)
    path.write_text("applications: 5")
    with pytest.raises(InvalidRequest, match=r"serve\.yaml.*applications"):
        read_serve_file(path)
