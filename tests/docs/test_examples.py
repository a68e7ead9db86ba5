"""The examples that need more than this machine has: Go and a cluster. Their parts are checked instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from meteora_dist.serving.config_file import parse_serve_config
from meteora_dist.serving.proto.meteora.v1 import admin_pb2, inference_pb2
from tests.docs.walk import ROOT, block, blocks
from tests.k8s.conftest import Schema, kuberay_schema
from tests.support.kustomize import render

LAPTOP = ROOT / "examples" / "kuberay-laptop"
GO = "examples/go/README.md"


def camel(name: str) -> str:
    """What protoc-gen-go calls a field."""
    return "".join(word.capitalize() for word in name.split("_"))


def test_the_protos_have_a_go_package() -> None:
    for proto in (inference_pb2, admin_pb2):
        assert proto.DESCRIPTOR.GetOptions().go_package == "meteora/v1;meteorav1"
    command = block(GO, "protoc")
    for proto in (inference_pb2, admin_pb2):
        assert proto.DESCRIPTOR.name in command
    for root in re.findall(r"--proto_path=(\S+)", command):
        assert (ROOT / root / inference_pb2.DESCRIPTOR.name).exists()


def test_the_go_program_uses_fields_that_are_there() -> None:
    (program,) = blocks(GO, "go")
    messages = inference_pb2.DESCRIPTOR.message_types_by_name
    literals = re.findall(r"&pb\.(\w+)\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", program)
    assert {name for name, _ in literals} >= {"GenerateRequest"}
    for name, body in literals:
        fields = {camel(field.name) for field in messages[name].fields} | {"Input"}
        assert set(re.findall(r"^\t+(\w+):", body, re.MULTILINE)) <= fields
    getters = {camel(field.name) for message in messages.values() for field in message.fields}
    assert set(re.findall(r"\.Get(\w+)\(", program)) <= getters
    assert "NewInferenceClient" in program
    assert "GenerateStream" in inference_pb2.DESCRIPTOR.services_by_name["Inference"].methods_by_name


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    return kuberay_schema("rayservices", tmp_path_factory.mktemp("crds"))


def test_kuberays_schema_knows_every_field_of_the_laptops_cluster(schema: Schema) -> None:
    (service,) = (manifest for manifest in render(LAPTOP) if manifest["kind"] == "RayService")
    assert schema(service) == []


def test_the_laptops_cluster() -> None:
    manifests = render(LAPTOP)
    (service,) = (manifest for manifest in manifests if manifest["kind"] == "RayService")
    file = parse_serve_config(yaml.safe_dump_all(manifests), "stdin")
    assert (file.service.mesh.size, file.service.access) == (2, "keys")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    (head,) = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    needed = file.service.replica_cpus + file.service.mesh.size * file.service.rank_cpus
    # Ray counts the CPUs of a pod by its limit.
    assert int(worker["resources"]["limits"]["cpu"]) >= needed
    image = worker["image"]
    assert image == head["image"]
    text = (LAPTOP / "README.md").read_text()
    assert f"-t {image} ." in text
    assert f"kind load docker-image {image} " in text
    assert yaml.safe_load((LAPTOP / "kind.yaml").read_text())["kind"] == "Cluster"


def test_the_secrets_it_makes_are_those_the_pods_read() -> None:
    manifests = render(LAPTOP)
    (service,) = (manifest for manifest in manifests if manifest["kind"] == "RayService")
    wanted = set(re.findall(r"secretName: ([\w-]+)", yaml.safe_dump(service)))
    text = (LAPTOP / "README.md").read_text()
    assert set(re.findall(r"secret generic ([\w-]+)", text)) == wanted


def test_numerics_names_tolerances_that_tests_have() -> None:
    rows = re.findall(r"^\| .* \| .* \| (`.*`) \| `(tests/\S+)` \|$", (ROOT / "docs" / "numerics.md").read_text(), re.M)
    assert len(rows) == 8
    for tolerances, path in rows:
        text = Path(ROOT, path).read_text()
        for tolerance in re.findall(r"`([^`]+)`", tolerances):
            assert tolerance in text, (path, tolerance)
