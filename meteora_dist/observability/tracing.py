"""Traces: one OpenTelemetry span a call that asks for tokens, with what the routing came to.

Who runs the service decides where spans go, and how many there are, by Serve's ``tracing_config``. Without one nothing
is recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from meteora_dist.observability.summary import CallSummary

TOP_EXPERTS = 5
"""Experts a span names."""

_CARRIED = ("traceparent", "tracestate")
_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
}
"""Facts that OpenTelemetry has a name for; the others go by ours."""
_NAMED_BY_THE_SPAN = ("operation", "duration_ms")
_SERVER_FAULT = 500


class CallSpan:
    """The span of one call.

    Attributes:
        recording: Whether anybody will see it.
    """

    def __init__(self, tracer: Tracer, headers: Mapping[str, str], started_ns: int) -> None:
        """Begins it, below the span in force, or else below the one of the caller.

        Args:
            tracer: Makes it.
            headers: Lower-case names; ``traceparent`` and ``tracestate`` are read.
            started_ns: When the call arrived, in nanoseconds of the Unix epoch.
        """
        self._span = tracer.start_span("call", context=_parent(headers), kind=SpanKind.SERVER, start_time=started_ns)
        self.recording = self._span.is_recording()
        self._started_ns = started_ns
        self._sums: dict[str, float] = {}

    def routed(self, experts: Sequence[str], shares: Sequence[float]) -> None:
        """Adds the experts' shares in a token."""
        for expert, share in zip(experts, shares, strict=True):
            self._sums[expert] = self._sums.get(expert, 0.0) + share

    def end(self, summary: CallSummary) -> str | None:
        """Ends it with the facts of the call; returns the id of its trace, or None when it is not recorded."""
        if not self.recording:
            return None
        # Its route is known only now.
        self._span.update_name(summary.operation)
        for name, value in summary.fields().items():
            if name not in _NAMED_BY_THE_SPAN:
                # All are plain: text or numbers.
                self._span.set_attribute(_ATTRIBUTES.get(name, f"meteora.{name}"), value)  # type: ignore[arg-type]
        self._set_routing()
        if summary.ttft_ms is not None:
            self._span.add_event("first token", timestamp=self._started_ns + int(summary.ttft_ms * 1e6))
        if summary.status >= _SERVER_FAULT:
            self._span.set_status(Status(StatusCode.ERROR, summary.code))
        self._span.end(self._started_ns + int(summary.duration_ms * 1e6))
        return trace.format_trace_id(self._span.get_span_context().trace_id)

    def _set_routing(self) -> None:
        total = sum(self._sums.values())
        if not total:
            return
        top = sorted(self._sums, key=self._sums.__getitem__, reverse=True)[:TOP_EXPERTS]
        self._span.set_attribute("meteora.dominating_expert", top[0])
        self._span.set_attribute("meteora.top_experts", top)
        self._span.set_attribute("meteora.top_shares", [round(self._sums[expert] / total, 4) for expert in top])


def default_tracer() -> Tracer:
    """Of the process: it records nothing until Serve, or whoever runs it, has set up tracing."""
    return trace.get_tracer("meteora_dist")


def _parent(headers: Mapping[str, str]) -> Context | None:
    """None for the context in force."""
    if trace.get_current_span().get_span_context().is_valid or "traceparent" not in headers:
        return None
    return TraceContextTextMapPropagator().extract({name: headers[name] for name in _CARRIED if name in headers})
