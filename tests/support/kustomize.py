"""Renders a kustomization with ``kubectl`` where there is one, and by a small reading of our own where not.

The reading knows what our kustomizations use, and fails on anything else.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]
KNOWN = {"apiVersion", "kind", "namespace", "resources", "images", "patches"}


def render(folder: Path) -> list[Manifest]:
    """The manifests of an overlay."""
    return render_by_kubectl(folder) if shutil.which("kubectl") else render_by_reading(folder)


def render_by_kubectl(folder: Path) -> list[Manifest]:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True, timeout=60)
    return list(yaml.safe_load_all(done.stdout))


def render_by_reading(folder: Path) -> list[Manifest]:
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert set(plan) <= KNOWN, f"{folder}: the reading does not know {set(plan) - KNOWN}"
    manifests = [manifest for name in plan["resources"] for manifest in _resource(folder / name)]
    for patch in plan.get("patches", []):
        content = yaml.safe_load(patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text())
        manifests = _patched(manifests, _plain(content), patch.get("target", {}))
    for manifest in manifests:
        if "namespace" in plan and manifest["kind"] != "Namespace":
            manifest["metadata"]["namespace"] = plan["namespace"]
        for image in plan.get("images", []):
            _retag(manifest, image)
    return manifests


def _resource(path: Path) -> list[Manifest]:
    return render_by_reading(path) if path.is_dir() else [_plain(item) for item in yaml.safe_load_all(path.read_text())]


def _plain(value: Any) -> Any:
    """Without shared parts: a YAML anchor is one object, and a patch would reach every place it is used."""
    return json.loads(json.dumps(value))


def _patched(manifests: list[Manifest], patch: Any, target: dict[str, str]) -> list[Manifest]:
    if isinstance(patch, list):
        assert set(target) == {"kind"}
        (manifest,) = [item for item in manifests if item["kind"] == target["kind"]]
        for operation in patch:
            _apply(manifest, operation)
        return manifests
    (manifest,) = [item for item in manifests if _identity(item) == _identity(patch)]
    if patch.pop("$patch", None) == "delete":
        return [item for item in manifests if item is not manifest]
    assert manifest["apiVersion"].startswith("ray.io/"), "kinds of Kubernetes itself merge lists by key"
    _merge(manifest, patch)
    return manifests


def _identity(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


def _apply(manifest: Any, operation: Manifest) -> None:
    """One operation of RFC 6902."""
    assert operation["op"] in ("add", "replace"), operation
    *parents, last = operation["path"].removeprefix("/").split("/")
    for key in parents:
        manifest = manifest[int(key)] if isinstance(manifest, list) else manifest[key]
    if last == "-":
        manifest.append(operation["value"])
    else:
        assert operation["op"] == "add" or last in manifest, operation
        manifest[last] = operation["value"]


def _merge(into: Manifest, patch: Manifest) -> None:
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _retag(value: Any, image: Manifest) -> None:
    if isinstance(value, list):
        for item in value:
            _retag(item, image)
    elif isinstance(value, dict):
        for container in value.get("containers", []):
            if container["image"].split(":")[0] == image["name"]:
                container["image"] = f"{image.get('newName', image['name'])}:{image['newTag']}"
        for item in value.values():
            _retag(item, image)
