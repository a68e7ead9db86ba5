"""The RayJob that trains gates: valid, as restricted as the service, and asking for what its command needs."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
import yaml

import meteora_dist
from meteora_dist.cli.main import build_app
from meteora_dist.cli.train_options import read_options
from meteora_dist.training.settings import GateSettings
from tests.k8s.conftest import ROOT, kuberay_schema
from tests.support.kustomize import Manifest, render, render_by_kubectl, render_by_reading
from tests.test_packaging import pins

FOLDER = ROOT / "k8s" / "training"
GPU = ROOT / "k8s" / "overlays" / "gpu"


@pytest.fixture(scope="module")
def manifests() -> dict[str, Manifest]:
    return {manifest["kind"]: manifest for manifest in render(FOLDER)}


@pytest.fixture(scope="module")
def job(manifests: dict[str, Manifest]) -> Manifest:
    return manifests["RayJob"]


@pytest.fixture(scope="module")
def pods(job: Manifest) -> list[Manifest]:
    """Submitter, head and worker."""
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    return [job["spec"]["submitterPodTemplate"], cluster["headGroupSpec"]["template"], group["template"]]


@pytest.fixture(scope="module")
def arguments(job: Manifest) -> dict[str, object]:
    """The command's options, parsed by the command line itself."""
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[0] == "meteora"
    command = typer.main.get_command(build_app(words[1:])).commands["train"].commands["gates"]
    return command.make_context("gates", words[3:], resilient_parsing=False).params


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
def test_our_reading_of_the_kustomization_is_kubectls() -> None:
    theirs, ours = (
        sorted(read(FOLDER), key=lambda item: item["kind"]) for read in (render_by_kubectl, render_by_reading)
    )
    assert ours == theirs


def test_kuberays_schema_knows_every_field(job: Manifest, tmp_path: Path) -> None:
    assert kuberay_schema("rayjobs", tmp_path)(job) == []


def test_the_command_and_its_options_exist(arguments: dict[str, object]) -> None:
    loop, gates = read_options(None, list(arguments["options"]), GateSettings)  # type: ignore[call-overload]
    # The paper's batch: sixteen sequences a step.
    assert loop.micro_batch * loop.accumulation * int(str(arguments["workers"])) == 16
    assert (loop.steps, loop.zero_stage, gates.beta) == (5000, 3, 50.0)


def test_workers_have_what_the_command_asks_for(
    job: Manifest, pods: list[Manifest], arguments: dict[str, object]
) -> None:
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = pods[2]["spec"]["containers"][0]["resources"]["limits"]
    assert arguments["gpu"]
    assert group["replicas"] * limits["nvidia.com/gpu"] == arguments["workers"]
    assert float(limits["cpu"]) == arguments["cpus"]
    # All of them read and write the same folders.
    claims = {item["metadata"]["name"] for item in yaml.safe_load_all((GPU / "volumes.yaml").read_text())}
    for pod in pods[1:]:
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        mounts = {m["mountPath"]: m for m in pod["spec"]["containers"][0]["volumeMounts"]}
        assert {
            volumes[mounts[path]["name"]]["persistentVolumeClaim"]["claimName"] for path in ("/models", "/banks")
        } == claims
        assert not mounts["/banks"].get("readOnly")
        for option in ("base", "adapters", "data", "out", "run"):
            assert any(Path(str(arguments[option])).is_relative_to(path) for path in ("/models", "/banks")), option


def test_no_container_may_do_more_than_it_needs(pods: list[Manifest]) -> None:
    for pod in pods:
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["automountServiceAccountToken"] is False
        (container,) = pod["spec"]["containers"]
        context = container["securityContext"]
        assert (context["allowPrivilegeEscalation"], context["readOnlyRootFilesystem"]) == (False, True)
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {variable["name"]: variable["value"] for variable in container["env"]}["HOME"] == "/tmp"
        assert "/tmp" in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_pods_are_those_of_the_policy(manifests: dict[str, Manifest], pods: list[Manifest]) -> None:
    wanted = manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    assert all(wanted.items() <= pod["metadata"]["labels"].items() for pod in pods)
    named = {port["containerPort"] for port in pods[1]["spec"]["containers"][0]["ports"]}
    for rule in manifests["NetworkPolicy"]["spec"]["ingress"]:
        assert {port["port"] for port in rule.get("ports", [])} <= named


def test_image_and_ray_are_the_projects(job: Manifest, pods: list[Manifest]) -> None:
    (image,) = {container["image"] for pod in pods for container in pod["spec"]["containers"]}
    target = image.removeprefix(f"meteora-dist:{meteora_dist.__version__}-")
    assert re.search(rf"^FROM .* AS {target}$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pins()["ray"]
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token", "secretName": "meteora-ray-token"}
