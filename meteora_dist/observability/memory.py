"""A recorder that keeps everything, for tests and for whoever has no Ray."""

from __future__ import annotations

from collections import defaultdict

from meteora_dist.observability.metrics import NO_LABELS, Labels, Metric

Series = tuple[str, tuple[tuple[str, str], ...]]


class MemoryRecorder:
    """Counters and gauges by name and labels, and every observation of histograms.

    Attributes:
        values: Of counters and gauges.
        observed: Of histograms.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self.values: dict[Series, float] = {}
        self.observed: defaultdict[Series, list[float]] = defaultdict(list)

    def add(self, metric: Metric, amount: float, labels: Labels = NO_LABELS) -> None:
        """See ``Recorder``."""
        series = _series(metric, labels, "counter")
        if amount < 0:
            raise ValueError(f"{metric.name} cannot shrink by {-amount}")
        if amount:
            self.values[series] = self.values.get(series, 0.0) + amount

    def set(self, metric: Metric, value: float, labels: Labels = NO_LABELS) -> None:
        """See ``Recorder``."""
        self.values[_series(metric, labels, "gauge")] = value

    def observe(self, metric: Metric, value: float, labels: Labels = NO_LABELS) -> None:
        """See ``Recorder``."""
        self.observed[_series(metric, labels, "histogram")].append(value)

    def value(self, metric: Metric, **labels: str) -> float | None:
        """Of a counter or gauge; None when it was never written."""
        return self.values.get((metric.name, tuple(sorted(labels.items()))))

    def of(self, metric: Metric, **labels: str) -> list[float]:
        """Observations of a histogram."""
        return self.observed[metric.name, tuple(sorted(labels.items()))]


def _series(metric: Metric, labels: Labels, kind: str) -> Series:
    if metric.kind != kind:
        raise ValueError(f"{metric.name} is a {metric.kind}, not a {kind}")
    if set(labels) != set(metric.labels):
        raise ValueError(f"{metric.name} has the labels {metric.labels}, not {tuple(labels)}")
    return metric.name, tuple(sorted(labels.items()))
