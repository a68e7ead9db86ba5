"""Sends spans to an OpenTelemetry collector; needs the extra ``otlp``."""

from __future__ import annotations

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def processors() -> list[SpanProcessor]:
    """For ``tracing_config.exporter_import_path``; ``OTEL_EXPORTER_OTLP_ENDPOINT`` says where the collector is."""
    return [BatchSpanProcessor(OTLPSpanExporter())]
