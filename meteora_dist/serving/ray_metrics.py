"""Metrics go to Ray: the agent of every node exports them for Prometheus, with the replica they are from."""

from __future__ import annotations

from typing import Any

from ray.serve.metrics import Counter, Gauge, Histogram

from meteora_dist.observability.metrics import METRICS, NO_LABELS, Labels, Metric


class RayRecorder:
    """Writes every metric of the table to the Ray metric of its name."""

    def __init__(self) -> None:
        """Declares all of them; inside a replica they carry its name."""
        self._declared = {metric: _declare(metric) for metric in METRICS}

    def add(self, metric: Metric, amount: float, labels: Labels = NO_LABELS) -> None:
        """See ``Recorder``."""
        # Ray refuses to add nothing.
        if amount:
            self._declared[metric].inc(amount, tags=labels)

    def set(self, metric: Metric, value: float, labels: Labels = NO_LABELS) -> None:
        """See ``Recorder``."""
        self._declared[metric].set(value, tags=labels)

    def observe(self, metric: Metric, value: float, labels: Labels = NO_LABELS) -> None:
        """See ``Recorder``."""
        self._declared[metric].observe(value, tags=labels)


def _declare(metric: Metric) -> Any:
    # Ray's annotation allows for one key only.
    keys: Any = metric.labels
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.help, boundaries=list(metric.buckets), tag_keys=keys)
    return {"counter": Counter, "gauge": Gauge}[metric.kind](metric.name, metric.help, tag_keys=keys)
