"""Every overlay, rendered once."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import pytest

from meteora_dist.serving.config_file import ServeFile, parse_serve_config
from tests.support.kustomize import Manifest, render

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
OVERLAYS = ("cpu-demo", "gpu", "gpu-ha")
Schema = Callable[[Manifest], list[str]]
"""What is wrong with a manifest."""


def kuberay_schema(kind: str, folder: Path) -> Schema:
    """KubeRay's schema of one kind, such as ``rayjobs``: reading all of them takes long."""
    if not (SHARED / "data" / "crds").exists():
        pytest.skip("KubeRay's CRDs are not beside this checkout")
    spec = importlib.util.spec_from_file_location("validate_crd", SHARED / "tools" / "validate_crd.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    shutil.copy(SHARED / "data" / "crds" / f"ray.io_{kind}.yaml", folder)
    return partial(tool.check, tool.load_crds(str(folder)))


@dataclass(frozen=True)
class Overlay:
    """One rendered overlay and the parts of it that tests ask for."""

    name: str
    manifests: list[Manifest]

    def of(self, *kinds: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] in kinds]

    @cached_property
    def service(self) -> Manifest:
        (service,) = self.of("RayService")
        return service

    @property
    def cluster(self) -> Manifest:
        return self.service["spec"]["rayClusterConfig"]

    @property
    def head(self) -> Manifest:
        return self.cluster["headGroupSpec"]["template"]

    @property
    def group(self) -> Manifest:
        (group,) = self.cluster["workerGroupSpecs"]
        return group

    @property
    def worker(self) -> Manifest:
        return self.group["template"]

    @cached_property
    def serve(self) -> ServeFile:
        return parse_serve_config(self.service["spec"]["serveConfigV2"], self.name)

    @property
    def pods(self) -> list[tuple[dict[str, str], Manifest]]:
        """Labels and spec of every kind of pod; KubeRay adds labels of its own."""
        ray = {"head": self.head, "worker": self.worker}
        pods = [({"ray.io/node-type": kind} | pod["metadata"]["labels"], pod["spec"]) for kind, pod in ray.items()]
        templates = [manifest["spec"]["template"] for manifest in self.of("StatefulSet")]
        return pods + [(template["metadata"]["labels"], template["spec"]) for template in templates]


@pytest.fixture(scope="session", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> Overlay:
    return Overlay(request.param, render(ROOT / "k8s" / "overlays" / request.param))
