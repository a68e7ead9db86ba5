"""The manifests hold together: with each other, with the application's configuration, and with KubeRay's schema."""

from __future__ import annotations

import re
import shutil
from typing import Any

import pytest
import yaml

import meteora_dist
from meteora_dist.serving.app import application
from meteora_dist.serving.gate import KEYS_FILE_VARIABLE
from tests.k8s.conftest import OVERLAYS, ROOT, Overlay, Schema, kuberay_schema
from tests.support.kustomize import Manifest, render_by_kubectl, render_by_reading
from tests.test_packaging import pins

GUIDE = (ROOT / "docs" / "operations.md").read_text()
GATEWAY = list(yaml.safe_load_all((ROOT / "k8s" / "examples" / "gateway.yaml").read_text()))
DEMO_FILE = yaml.safe_load((ROOT / "serve_config.yaml").read_text())


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
@pytest.mark.parametrize("name", OVERLAYS)
def test_our_reading_of_a_kustomization_is_kubectls(name: str) -> None:
    folder = ROOT / "k8s" / "overlays" / name
    theirs, ours = (
        sorted(render(folder), key=lambda item: (item["kind"], item["metadata"]["name"]))
        for render in (render_by_kubectl, render_by_reading)
    )
    assert ours == theirs


@pytest.fixture(scope="session")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Schema:
    return kuberay_schema("rayservices", tmp_path_factory.mktemp("crds"))


def test_kuberays_schema_knows_every_field(overlay: Overlay, schema: Schema) -> None:
    assert schema(overlay.service) == []


def test_the_application_is_that_of_serve_config_yaml(overlay: Overlay) -> None:
    def common(config: Manifest) -> Manifest:
        (app,) = config["applications"]
        app = {key: value for key, value in app.items() if key not in ("args", "deployments")}
        http = {key: value for key, value in config["http_options"].items() if key != "host"}
        return {"http": http, "grpc": config["grpc_options"], "app": app}

    config = yaml.safe_load(overlay.service["spec"]["serveConfigV2"])
    assert common(config) == common(DEMO_FILE)
    assert (config["proxy_location"], config["http_options"]["host"]) == ("EveryNode", "0.0.0.0")
    if overlay.name == "cpu-demo":
        opt = "/opt/meteora"
        paths = {"model": f"{opt}/smollm2-135m-instruct", "bank": f"{opt}/bank", "generations": "/tmp/generations"}
        cluster = paths | {"drain_s": 600, "access": "keys"}
        assert config["applications"][0]["args"] == DEMO_FILE["applications"][0]["args"] | cluster


def test_ports_are_those_of_the_configuration(overlay: Overlay) -> None:
    serve = {"serve": overlay.serve.http_port, "serve-grpc": overlay.serve.grpc_port}
    for pod in (overlay.head, overlay.worker):
        assert ports(pod["spec"]) == ports(pod["spec"]) | serve
    exposed = overlay.service["spec"]["serveService"]["spec"]["ports"]
    assert {port["name"]: port["port"] for port in exposed} == serve
    assert {port["name"]: port["appProtocol"] for port in exposed}["serve-grpc"] == "kubernetes.io/h2c"
    routes = {item["kind"]: item["spec"]["rules"][0]["backendRefs"][0] for item in GATEWAY if "Route" in item["kind"]}
    name = f"{overlay.service['metadata']['name']}-serve-svc"
    assert routes["HTTPRoute"] == {"name": name, "port": serve["serve"]}
    assert routes["GRPCRoute"] == {"name": name, "port": serve["serve-grpc"]}


def test_network_policies_name_ports_that_exist(overlay: Overlay) -> None:
    (policy,) = [item for item in overlay.of("NetworkPolicy") if item["metadata"]["name"] == "meteora"]
    inside, gateway, monitoring, operator = (
        {port["port"] for port in rule.get("ports", [])} for rule in policy["spec"]["ingress"]
    )
    assert not inside
    assert gateway == {overlay.serve.http_port, overlay.serve.grpc_port}
    head = ports(overlay.head["spec"])
    assert monitoring == {port for name, port in head.items() if name.endswith("metrics")}
    assert operator == {head["dashboard"]}
    for monitor in overlay.of("PodMonitor"):
        assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= set(head)


def test_selectors_find_pods(overlay: Overlay) -> None:
    labels = [labels for labels, _ in overlay.pods]
    for kind, path in (
        ("NetworkPolicy", "podSelector"),
        ("PodDisruptionBudget", "selector"),
        ("PodMonitor", "selector"),
    ):
        for manifest in overlay.of(kind):
            wanted = manifest["spec"][path]["matchLabels"]
            assert any(wanted.items() <= found.items() for found in labels), (manifest["metadata"], wanted)
    for wanted in nested(overlay.manifests, "podSelector"):
        assert any(wanted["matchLabels"].items() <= found.items() for found in labels), wanted


def test_disruption_budgets_leave_room(overlay: Overlay) -> None:
    budgets = {item["metadata"]["name"]: item["spec"]["minAvailable"] for item in overlay.of("PodDisruptionBudget")}
    assert all(type(number) is int for number in budgets.values())
    if overlay.name == "gpu-ha":
        assert set(budgets) == {"meteora-workers"}
        assert budgets["meteora-workers"] < overlay.group["minReplicas"]
    else:
        assert set(budgets) == {"meteora-workers", "meteora-head"}


def test_no_container_may_do_more_than_it_needs(overlay: Overlay) -> None:
    (namespace,) = overlay.of("Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    contexts = [overlay.cluster["autoscalerOptions"]["securityContext"]]
    for _, spec in overlay.pods:
        pod = spec["securityContext"]
        assert (pod["runAsNonRoot"], pod["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
        assert pod["runAsUser"] > 0
        contexts += [container["securityContext"] for container in spec["containers"]]
    for context in contexts:
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] is True


def test_what_is_written_has_a_place(overlay: Overlay) -> None:
    for pod in (overlay.head["spec"], overlay.worker["spec"]):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert "emptyDir" in mounts["/tmp"]
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
        assert environment(container)["HOME"] == "/tmp"


def test_head_and_workers_run_one_image_with_one_environment(overlay: Overlay) -> None:
    (head,), (worker,) = overlay.head["spec"]["containers"], overlay.worker["spec"]["containers"]
    assert head["image"] == worker["image"]
    assert environment(head).items() <= environment(worker).items()
    assert environment(head)["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert environment(head)["RAY_SERVE_GRPC_MAX_MESSAGE_SIZE"] == str(overlay.serve.service.max_body_bytes)
    assert overlay.cluster["rayVersion"] == pins()["ray"]
    assert overlay.cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_images_are_of_this_version_and_have_a_target(overlay: Overlay) -> None:
    images = {container["image"] for _, spec in overlay.pods for container in spec["containers"]}
    assert not [image for image in images if ":" not in image or image.endswith(":latest")]
    (ours,) = [image for image in images if image.startswith("meteora-dist:")]
    target = ours.removeprefix(f"meteora-dist:{meteora_dist.__version__}-")
    assert re.search(rf"^FROM .* AS {target}$", (ROOT / "docker" / "Dockerfile").read_text(), re.MULTILINE)


def test_names_and_authentication(overlay: Overlay) -> None:
    # Longer names leave no room for what KubeRay appends.
    assert len(overlay.service["metadata"]["name"]) <= 47
    # The operator takes a missing mode for "disabled".
    assert overlay.cluster["authOptions"] == {"mode": "token", "secretName": "meteora-ray-token"}
    assert all("namespace" in item["metadata"] for item in overlay.manifests if item["kind"] != "Namespace")


def test_nothing_ends_before_the_longest_stream(overlay: Overlay) -> None:
    config = yaml.safe_load(overlay.service["spec"]["serveConfigV2"])
    stream_s = config["http_options"]["request_timeout_s"]
    assert stream_s == config["grpc_options"]["request_timeout_s"]
    # Ours ends a stream with an error; Serve's cuts it off.
    assert overlay.serve.service.max_request_s < stream_s
    (worker,) = overlay.worker["spec"]["containers"]
    assert overlay.service["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    assert overlay.service["spec"]["rayClusterDeletionDelaySeconds"] > stream_s
    assert int(environment(worker)["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > stream_s
    assert overlay.serve.service.drain_s >= stream_s
    # A pod that stops: a replica starts elsewhere, then the streams of the old one end.
    drain = worker["lifecycle"]["preStop"]["exec"]["command"][-1]
    deadline_s = int(re.search(r"--deadline-remaining-seconds (\d+)", drain)[1])
    assert deadline_s >= overlay.serve.service.start_timeout_s + stream_s
    assert overlay.worker["spec"]["terminationGracePeriodSeconds"] > deadline_s
    (http,) = [item for item in GATEWAY if item["kind"] == "HTTPRoute"]
    assert http["spec"]["rules"][0]["timeouts"]["request"] == f"{stream_s:g}s"


def test_every_replica_fits_a_worker(overlay: Overlay) -> None:
    limits = overlay.worker["spec"]["containers"][0]["resources"]["limits"]
    has = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
    bundles = application(overlay.serve.service)._bound_deployment._replica_config.placement_group_bundles
    wants = {name: sum(bundle.get(name, 0) for bundle in bundles) for name in has}
    assert all(wants[name] <= has[name] for name in has), (wants, has)
    scaling = overlay.serve.overrides.get("autoscaling_config", {"min_replicas": 1, "max_replicas": 1})
    assert overlay.group["minReplicas"] >= scaling["min_replicas"]
    # One worker more than replicas: the place of one that takes over from a drained one.
    assert overlay.group["maxReplicas"] > scaling["max_replicas"]


def test_volumes_and_secrets_exist(overlay: Overlay) -> None:
    claims = {item["metadata"]["name"] for item in overlay.of("PersistentVolumeClaim")}
    assert {claim["claimName"] for claim in nested(overlay.service, "persistentVolumeClaim")} == claims
    documented = dict(
        re.findall(r"kubectl -n meteora create secret generic (\S+) \\?\n? *--from-\w+=(\w[\w.-]*)", GUIDE)
    )
    for reference in nested(overlay.manifests, "secretKeyRef"):
        assert documented[reference["name"]] == reference["key"]
    names = {volume["secretName"] for volume in nested(overlay.manifests, "secret")}
    assert names | {overlay.cluster["authOptions"]["secretName"]} <= set(documented)
    assert documented[overlay.cluster["authOptions"]["secretName"]] == "auth_token"


def test_replicas_find_their_keys(overlay: Overlay) -> None:
    assert (overlay.serve.service.access, overlay.serve.service.keys_file) == ("keys", None)
    (container,), volumes = overlay.worker["spec"]["containers"], overlay.worker["spec"]["volumes"]
    (volume,) = [volume for volume in volumes if volume.get("secret") == {"secretName": "meteora-api-keys"}]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == volume["name"]]
    assert (
        environment(container)[KEYS_FILE_VARIABLE]
        == f"{mount['mountPath']}/{secrets_of_the_guide()['meteora-api-keys']}"
    )


def secrets_of_the_guide() -> dict[str, str]:
    """Every Secret that the guide says how to create, and its key."""
    return dict(re.findall(r"kubectl -n meteora create secret generic (\S+) \\?\n? *--from-\w+=(\w[\w.-]*)", GUIDE))


def test_replicas_that_take_experts_share_a_volume_for_them(overlay: Overlay) -> None:
    service, spec = overlay.serve.service, overlay.worker["spec"]
    assert bool(service.expert_roots) == (overlay.name != "cpu-demo")
    if not service.expert_roots:
        assert "autoscaling_config" not in overlay.serve.overrides
        return
    (container,) = spec["containers"]
    (mount,) = [mount for mount in container["volumeMounts"] if mount["mountPath"] == "/banks"]
    assert not mount.get("readOnly")
    for folder in (service.bank, service.generations_folder, *service.expert_roots):
        assert folder.is_relative_to(mount["mountPath"])
    # Generations that follow from another bank are another folder.
    assert service.generations_folder == service.bank.with_name(f"{service.bank.name}-generations")
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == mount["name"]]
    assert not volume["persistentVolumeClaim"].get("readOnly")
    claims = {item["metadata"]["name"]: item["spec"] for item in overlay.of("PersistentVolumeClaim")}
    assert claims[volume["persistentVolumeClaim"]["claimName"]]["accessModes"] == ["ReadWriteMany"]


def ports(spec: Manifest) -> dict[str, int]:
    """Ports of the first container by name."""
    return {port["name"]: port["containerPort"] for port in spec["containers"][0]["ports"]}


def environment(container: Manifest) -> dict[str, str]:
    return {variable["name"]: variable["value"] for variable in container["env"]}


def nested(value: Any, key: str) -> list[Any]:
    """Everything that is called ``key``, at any depth."""
    if isinstance(value, list):
        return [found for item in value for found in nested(item, key)]
    if not isinstance(value, dict):
        return []
    here = [value[key]] if key in value else []
    return here + [found for item in value.values() for found in nested(item, key)]
