"""docs/observability.md has every metric, log field and span attribute, and no other."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from meteora_dist.observability import metrics
from meteora_dist.observability.metrics import METRICS
from meteora_dist.observability.summary import CallSummary
from meteora_dist.observability.tracing import CallSpan
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.grpc_health import SERVICES
from meteora_dist.serving.http_guard import PROBES

TEXT = (Path(__file__).parents[2] / "docs" / "observability.md").read_text()


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def first_cells(title: str) -> set[str]:
    """What the first column of a section's table names."""
    cells = re.findall(r"^\| (`[^|]*) \|", section(title), re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_the_table_of_metrics_is_ours() -> None:
    rows = [line for line in section("Metrics").splitlines() if line.startswith("| `")]
    expected = [
        f"| `{metric.exported[0].removesuffix('_bucket')}` | {metric.kind} | "
        f"{', '.join(f'`{label}`' for label in metric.labels)}{' ' if metric.labels else ''}| {metric.help} |"
        for metric in METRICS
    ]
    assert rows == expected


def test_values_of_labels_and_settings_are_there() -> None:
    for value in (*metrics.PROTOCOLS, *metrics.MODES, *metrics.OUTCOMES, metrics.OTHER_EXPERTS):
        assert f"`{value}`" in section("Metrics")
    defaults = {name: ServiceConfig.model_fields[name].default for name in ("max_expert_labels", "metrics_interval_s")}
    assert defaults == {"max_expert_labels": 512, "metrics_interval_s": 5.0}
    assert all(f"`{name}`" in section("Metrics") for name in defaults)


def test_the_fields_of_a_log_line_are_there() -> None:
    assert first_cells("Log") == {field.name for field in dataclasses.fields(CallSummary)} | {"trace_id"}


def test_the_attributes_of_a_span_are_there() -> None:
    values = {field.name: 1 if field.type in ("int", "float", "float | None") else "x" for field in FIELDS}
    summary = CallSummary(**values)  # type: ignore[arg-type]
    assert set((_span(summary).attributes or {}).keys()) == first_cells("Traces")


FIELDS = dataclasses.fields(CallSummary)


def _span(summary: CallSummary) -> ReadableSpan:
    spans, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    span = CallSpan(provider.get_tracer("test"), {}, 1)
    span.routed(("a", "b"), (0.5, 0.5))
    assert span.end(summary) is not None
    (finished,) = spans.get_finished_spans()
    return finished


def test_the_probes_are_there() -> None:
    assert all(f"`GET {path}`" in section("Health") for path in PROBES)
    assert all(f"`{service or chr(34) * 2}`" in section("Health") for service in SERVICES)
