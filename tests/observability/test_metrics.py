"""The table of metrics, and what it takes."""

from __future__ import annotations

import re

import pytest

from meteora_dist.observability import metrics
from meteora_dist.observability.memory import MemoryRecorder
from meteora_dist.observability.metrics import METRICS, outcome_of
from meteora_dist.serving.ray_metrics import RayRecorder
from meteora_dist.serving.status import STATUS_OF


def test_names_are_ours_unique_and_plain() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names) == 26
    assert all(re.fullmatch(r"meteora_[a-z_]+[a-z]", name) for name in names)
    # Prometheus' own endings would come twice.
    assert not any(name.endswith(("_total", "_count", "_sum", "_bucket")) for name in names)


def test_every_kind_has_its_names_in_prometheus() -> None:
    assert metrics.REQUESTS.exported == ("ray_meteora_requests_total",)
    assert metrics.READY.exported == ("ray_meteora_ready",)
    assert metrics.REQUEST_SECONDS.exported[0] == "ray_meteora_request_seconds_bucket"


def test_histograms_and_only_they_have_rising_buckets() -> None:
    for metric in METRICS:
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_a_recorder_refuses_what_the_table_does_not_have() -> None:
    record = MemoryRecorder()
    with pytest.raises(ValueError, match="has the labels"):
        record.add(metrics.REQUESTS, 1, {"protocol": "http"})
    with pytest.raises(ValueError, match="is a gauge, not a counter"):
        record.add(metrics.READY, 1)
    with pytest.raises(ValueError, match="cannot shrink"):
        record.add(metrics.RANK_LOSSES, -1)


def test_every_status_of_ours_has_an_outcome() -> None:
    outcomes = {outcome_of(status.http) for status in STATUS_OF.values()} | {
        outcome_of(code) for code in range(200, 600)
    }
    assert outcomes == set(metrics.OUTCOMES)


def test_ray_takes_every_metric_of_the_table() -> None:
    record = RayRecorder()
    for metric in METRICS:
        declared = record._declared[metric].info
        assert (declared["name"], declared["tag_keys"]) == (metric.name, metric.labels)
        labels = dict.fromkeys(metric.labels, "x")
        write = {"counter": record.add, "gauge": record.set, "histogram": record.observe}[metric.kind]
        write(metric, 1.5, labels)
    record.add(metrics.RANK_LOSSES, 0)
    with pytest.raises(ValueError, match="Missing value for tag"):
        record.set(metrics.KV_CACHE_USED, 0.5)
