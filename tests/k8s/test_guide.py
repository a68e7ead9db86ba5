"""The operations guide says what the manifests and the code say."""

from __future__ import annotations

import re

import yaml

from meteora_dist.serving.config_file import parse_serve_config
from tests.k8s.conftest import OVERLAYS, ROOT, Overlay

PAGE = ROOT / "docs" / "operations.md"
TEXT = PAGE.read_text()


def test_files_and_overlays_exist() -> None:
    assert set(re.findall(r"^\| `([a-z-]+)` \|", TEXT.split("\n## ")[0], re.MULTILINE)) == set(OVERLAYS)
    for path in set(re.findall(r"\b(?:k8s|docker|tests)/[\w./-]*\w", TEXT)):
        assert (ROOT / path).exists(), path


def test_rendered_manifests_can_be_checked(overlay: Overlay) -> None:
    assert parse_serve_config(yaml.safe_dump_all(overlay.manifests), "stdin") == overlay.serve


def test_the_table_of_time_limits(overlay: Overlay) -> None:
    limits = {where: value for value, where in re.findall(r"^\| .* \| ([\d. /s]+) \| (.*) \|$", TEXT, re.MULTILINE)}
    service = overlay.serve.service
    fields = ("max_request_s", "drain_s", "start_timeout_s", "stall_timeout_s", "rebuild_wait_s", "generations_poll_s")
    for field in fields:
        assert limits[f"`{field}`"] == f"{getattr(service, field):g} s"
    assert limits["`heartbeat_s + heartbeat_timeout_s`"] == f"{service.heartbeat_s + service.heartbeat_timeout_s:g} s"
    spec = overlay.service["spec"]
    assert limits["`rayClusterDeletionDelaySeconds`"] == f"{spec['rayClusterDeletionDelaySeconds']} s"
    assert limits["`idleTimeoutSeconds`"] == f"{overlay.cluster['autoscalerOptions']['idleTimeoutSeconds']} s"
    pod = overlay.worker["spec"]
    assert limits["`terminationGracePeriodSeconds`"] == f"{pod['terminationGracePeriodSeconds']} s"
    if scaling := overlay.serve.overrides.get("autoscaling_config"):
        delays = f"{scaling['upscale_delay_s']} s / {scaling['downscale_delay_s']} s"
        assert limits["`upscale_delay_s`, `downscale_delay_s` (`gpu-ha`)"] == delays
