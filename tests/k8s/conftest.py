"""Every overlay, rendered once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from meteora_dist.serving.config_file import ServeFile, parse_serve_config
from tests.support.kustomize import Manifest, render

ROOT = Path(__file__).parents[2]
OVERLAYS = ("cpu-demo", "gpu", "gpu-ha")


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
