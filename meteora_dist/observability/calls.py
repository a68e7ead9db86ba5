"""One call from its arrival to its end: what is measured, traced and logged of it."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Literal, Self
from uuid import uuid4

from opentelemetry.trace import Tracer

from meteora_dist.observability import metrics
from meteora_dist.observability.metrics import Nowhere, Recorder, outcome_of
from meteora_dist.observability.summary import CallSummary
from meteora_dist.observability.tracing import CallSpan, default_tracer

logger = logging.getLogger("meteora_dist.requests")

Protocol = Literal["http", "grpc"]

OK = 200
CANCELLED = 499
"""What a call is counted as whose caller has gone away."""

_SANE_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")


class Observer:
    """Watches the calls of one replica.

    Attributes:
        recorder: Where metrics go.
        tracer: Makes the spans.
        live: Calls under way that ask for tokens.
    """

    def __init__(self, recorder: Recorder | None = None, tracer: Tracer | None = None) -> None:
        """Starts with no calls.

        Args:
            recorder: Where metrics go; nowhere by default.
            tracer: Makes the spans; the one of the process by default.
        """
        self.recorder: Recorder = recorder or Nowhere()
        self.tracer = tracer or default_tracer()
        self.live = 0

    def call(self, protocol: Protocol, operation: str, headers: Mapping[str, str]) -> Call:
        """A call that has just arrived. It lasts as long as a ``with`` block around it, and is the current one inside.

        Args:
            protocol: It came in by.
            operation: What is called, in our own words.
            headers: HTTP headers or gRPC metadata with lower-case names; ``x-request-id``, ``traceparent`` and
                ``tracestate`` are read.
        """
        return Call(self, protocol, operation, headers)


class Call:
    """One call. What the protocol and the service learn of it, they say here; nothing of its text.

    Attributes:
        request_id: The caller's, if it is sane; otherwise a new one.
        protocol: It came in by.
        operation: What is called.
        key: Name of the caller's API key, or ``anonymous``; None as long as nobody was let in.
        completion_id: The id its answer has; None before there is one.
    """

    def __init__(self, observer: Observer, protocol: Protocol, operation: str, headers: Mapping[str, str]) -> None:
        """See ``Observer.call``."""
        self.request_id = sane_id(headers.get("x-request-id")) or uuid4().hex
        self.protocol = protocol
        self.operation = operation
        self.key: str | None = None
        self.completion_id: str | None = None
        self._observer = observer
        self._headers = headers
        self._arrived = time.perf_counter()
        self._arrived_ns = time.time_ns()
        self._model: str | None = None
        self._mode = "none"
        self._prompt_tokens = 0
        self._admitted = False
        self._ended = False
        self._produced = 0
        self._first_token_s: float | None = None
        self._failure: tuple[int, str] | None = None
        self._span: CallSpan | None = None
        self._labels = {"protocol": protocol, "mode": self._mode}

    @property
    def traced(self) -> bool:
        """Whether somebody will see the call's trace: then it wants the experts' shares."""
        return self._span is not None and self._span.recording

    def asks(self, model: str, mode: str) -> None:
        """It asks for tokens.

        Args:
            model: As the caller wrote it, once it is known to be served.
            mode: One of ``metrics.MODES``.
        """
        assert mode in metrics.MODES, f"{mode!r} is not a mode"
        self._model, self._mode = model, mode
        self._labels = {"protocol": self.protocol, "mode": mode}
        if self._span is None:
            self._observer.live += 1
            self._span = CallSpan(self._observer.tracer, self._headers, self._arrived_ns)

    def reads(self, tokens: int) -> None:
        """It has a prompt of so many tokens, beside those it had before."""
        self._prompt_tokens += tokens

    def admitted(self) -> None:
        """The engine has room for it."""
        self._admitted = True
        waited_s = time.perf_counter() - self._arrived
        self._observer.recorder.observe(metrics.QUEUE_SECONDS, waited_s, self._labels)

    def answer(self, experts: Sequence[str]) -> AnswerWatch:
        """Watches one of its answers.

        Args:
            experts: Names, in the order of the shares.
        """
        return AnswerWatch(self, experts)

    def failed(self, status: int, code: str) -> None:
        """It has failed; the first failure counts.

        Args:
            status: HTTP status, or the one the gRPC status corresponds to.
            code: Of our error.
        """
        self._failure = self._failure or (status, code)

    def token(self, since_last_s: float | None) -> None:
        """One of its answers has got a token, the first one or so long after the one before."""
        self._produced += 1
        recorder = self._observer.recorder
        if since_last_s is not None:
            recorder.observe(metrics.INTER_TOKEN_SECONDS, since_last_s, self._labels)
        if self._first_token_s is None:
            self._first_token_s = time.perf_counter() - self._arrived
            recorder.observe(metrics.FIRST_TOKEN_SECONDS, self._first_token_s, self._labels)

    def routed(self, experts: Sequence[str], shares: Sequence[float]) -> None:
        """A token has come about with these shares of the experts."""
        if self._span is not None and self._span.recording:
            self._span.routed(experts, shares)

    def __enter__(self) -> Self:
        _CURRENT.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            gone = issubclass(kind, asyncio.CancelledError | GeneratorExit)
            self.failed(*((CANCELLED, "cancelled") if gone else (500, "internal_error")))
        self.end()

    def end(self) -> None:
        """It has ended, which counts once: at the latest with its ``with`` block."""
        if self._ended:
            return
        self._ended = True
        summary = self._summary()
        self._measure(summary)
        trace_id = None
        if self._span is not None:
            self._observer.live -= 1
            trace_id = self._span.end(summary)
        fields = summary.fields() | ({} if trace_id is None else {"trace_id": trace_id})
        logger.info("request", extra={"fields": fields})

    def _summary(self) -> CallSummary:
        status, code = self._failure or (OK, None)
        first = self._first_token_s
        return CallSummary(
            request_id=self.request_id,
            completion_id=self.completion_id,
            protocol=self.protocol,
            operation=self.operation,
            key=self.key,
            model=self._model,
            mode=self._mode,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._produced,
            ttft_ms=None if first is None else round(first * 1000, 1),
            duration_ms=round((time.perf_counter() - self._arrived) * 1000, 1),
            outcome=outcome_of(status),
            status=status,
            code=code,
        )

    def _measure(self, summary: CallSummary) -> None:
        recorder = self._observer.recorder
        recorder.add(metrics.REQUESTS, 1, {**self._labels, "outcome": summary.outcome})
        if self._admitted:
            recorder.add(metrics.PROMPT_TOKENS, summary.prompt_tokens, self._labels)
        recorder.add(metrics.COMPLETION_TOKENS, summary.completion_tokens, self._labels)
        if summary.status == OK and self._span is not None:
            recorder.observe(metrics.REQUEST_SECONDS, summary.duration_ms / 1000, self._labels)


class AnswerWatch:
    """One answer of a call, token by token."""

    def __init__(self, call: Call, experts: Sequence[str]) -> None:
        """See ``Call.answer``."""
        self._call = call
        self._experts = experts
        self._last: float | None = None

    def token(self, shares: Sequence[float] | None) -> None:
        """It has got a token.

        Args:
            shares: Of every expert in it; None when nobody asked.
        """
        now = time.perf_counter()
        self._call.token(None if self._last is None else now - self._last)
        self._last = now
        if shares is not None:
            self._call.routed(self._experts, shares)


_CURRENT: ContextVar[Call] = ContextVar("meteora_call")


def current_call() -> Call:
    """The call that this code runs for; one that nobody sees where there is none."""
    return _CURRENT.get(None) or Observer().call("http", "none", {})


def sane_id(text: str | None) -> str | None:
    """``text`` if it can be a request id: 1 to 128 letters, digits and ``._:+/=-``; None otherwise."""
    return text if text is not None and _SANE_ID.fullmatch(text) else None
