"""The Serve application and its configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.application_state import override_deployment_info
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.schema import ServeDeploySchema

from meteora_dist.errors import InvalidRequest
from meteora_dist.serving.app import build
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.config_file import parse_serve_config, read_serve_file, unknown_keys
from meteora_dist.serving.local import SERVICERS

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "serve_config.yaml"


def override(file: dict[str, Any], **settings: Any) -> None:
    """Sets something for our deployment in a configuration file."""
    file["applications"][0]["deployments"] = [{"name": "meteora", **settings}]


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
        (lambda file: override(file, max_ongoing_request=1), "applications.0.deployments.0.max_ongoing_request"),
        (
            lambda file: override(file, autoscaling_config={"max_replica": 2}),
            "applications.0.deployments.0.autoscaling_config.max_replica",
        ),
        (
            lambda file: override(file, autoscaling_config={"policy": {"kwargs": {}}}),
            "applications.0.deployments.0.autoscaling_config.policy.kwargs",
        ),
        (
            lambda file: override(file, ray_actor_options={"num_cpu": 1}),
            "applications.0.deployments.0.ray_actor_options.num_cpu",
        ),
        (
            lambda file: file["applications"][0].update(runtime_env={"env_var": {}}),
            "applications.0.runtime_env.env_var",
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
    content = yaml.safe_load(CONFIG.read_text())
    override(content, name="other")
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InvalidRequest, match="one deployment, meteora, not other"):
        read_serve_file(path)


def test_what_serve_cannot_import_is_refused() -> None:
    content = yaml.safe_load(CONFIG.read_text())
    override(content, autoscaling_config={"policy": {"policy_function": "nowhere:policy"}})
    with pytest.raises(InvalidRequest, match="here: No module named 'nowhere'"):
        parse_serve_config(yaml.safe_dump(content), "here")


@pytest.mark.parametrize("key", ["logging_config", "tracing_config", "controller_options"])
def test_serve_itself_refuses_unknown_keys_of_some_parts(key: str) -> None:
    content = yaml.safe_load(CONFIG.read_text()) | {key: {"typo": 1}}
    with pytest.raises(InvalidRequest, match=rf"here: {key}\.typo: Extra inputs"):
        parse_serve_config(yaml.safe_dump(content), "here")


def test_a_configuration_inside_manifests_is_read_as_strictly() -> None:
    service = {"kind": "RayService", "spec": {"serveConfigV2": CONFIG.read_text()}}
    manifests = [{"kind": "Namespace"}, service]
    assert parse_serve_config(yaml.safe_dump_all(manifests), "here") == read_serve_file(CONFIG)
    service["spec"] = {"serveConfigV2": CONFIG.read_text() + "\ntypo: 1\n"}
    with pytest.raises(InvalidRequest, match="here: unknown keys typo"):
        parse_serve_config(yaml.safe_dump_all(manifests), "here")
    with pytest.raises(InvalidRequest, match="here: must be one configuration, or manifests with one RayService"):
        parse_serve_config(yaml.safe_dump_all([*manifests, service]), "here")


def test_more_replicas_keep_the_placement_of_each() -> None:
    content = yaml.safe_load(CONFIG.read_text())
    scaling = {"min_replicas": 2, "max_replicas": 4}
    override(content, autoscaling_config=scaling, placement_group_strategy="STRICT_PACK")
    parse_serve_config(yaml.safe_dump(content), "here")
    schema = ServeDeploySchema.model_validate(content).applications[0]
    deployment = build(schema.args)._bound_deployment
    plain = DeploymentInfo(deployment._deployment_config, deployment._replica_config, 0, "job")
    info = override_deployment_info({"meteora": plain}, schema)["meteora"]
    assert info.replica_config.placement_group_bundles == [{"CPU": 1.0}, {"CPU": 0.8}]
    assert info.replica_config.placement_group_strategy == "STRICT_PACK"
    found = info.deployment_config.autoscaling_config
    assert (found.min_replicas, found.max_replicas) == (2, 4)
