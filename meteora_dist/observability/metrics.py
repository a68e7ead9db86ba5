"""Every metric of the service, in one table, and what metrics are written to.

A label has few values, whatever callers send: ``protocol``, ``mode`` and ``outcome`` come from the lists here; ``rank``
from the mesh; ``state``, ``kind`` and ``part`` from the code; ``expert`` is one of as many names as are configured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

Kind = Literal["counter", "gauge", "histogram"]
Labels = Mapping[str, str]

PROTOCOLS: Final = ("http", "grpc")
MODES: Final = ("auto", "auto-sequence", "named", "blend", "base", "none")
"""``none`` is a call that asks for no generation, or was refused before its mode was known."""
OUTCOMES: Final = ("ok", "invalid", "denied", "overloaded", "cancelled", "timeout", "unavailable", "failed")
OTHER_EXPERTS: Final = "other"

NAMESPACE: Final = "ray"
"""Ray puts it in front of every name."""

_FIRST_TOKENS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKENS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
_REQUESTS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: As it is declared to Ray.
        kind: What it does: grows, is set, or counts observations by size.
        help: What it says.
        labels: Its own labels; Ray adds some of its own.
        buckets: Of a histogram, upper bounds.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def exported(self) -> tuple[str, ...]:
        """The names it has in Prometheus."""
        name = f"{NAMESPACE}_{self.name}"
        suffixes = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
        return tuple(name + suffix for suffix in suffixes[self.kind])


def _counter(name: str, description: str, *labels: str) -> Metric:
    return Metric(f"meteora_{name}", "counter", description, labels)


def _gauge(name: str, description: str, *labels: str) -> Metric:
    return Metric(f"meteora_{name}", "gauge", description, labels)


def _histogram(name: str, description: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(f"meteora_{name}", "histogram", description, labels, buckets)


REQUESTS = _counter("requests", "Calls that ended, whatever came of them.", "protocol", "mode", "outcome")
PROMPT_TOKENS = _counter(
    "prompt_tokens", "Tokens of the prompts of calls that were admitted and have ended.", "protocol", "mode"
)
COMPLETION_TOKENS = _counter("completion_tokens", "Tokens produced for calls that ended.", "protocol", "mode")
REQUEST_SECONDS = _histogram(
    "request_seconds", "From a call's arrival to its end, of those that got an answer.", _REQUESTS, "protocol", "mode"
)
FIRST_TOKEN_SECONDS = _histogram(
    "first_token_seconds", "From a call's arrival to its first token.", _FIRST_TOKENS, "protocol", "mode"
)
INTER_TOKEN_SECONDS = _histogram(
    "inter_token_seconds", "Between two tokens of one answer.", _TOKENS, "protocol", "mode"
)
QUEUE_SECONDS = _histogram(
    "queue_seconds", "From a call's arrival until the engine has room for it.", _FIRST_TOKENS, "protocol", "mode"
)
LIVE_REQUESTS = _gauge("live_requests", "Calls under way that ask for tokens, waiting ones included.")
WAITING_REQUESTS = _gauge("waiting_requests", "Calls that wait until the engine has room for them.")
READY = _gauge(
    "ready", "1 while the engine answers, 0 while it is rebuilt, has failed, or cannot load the newest bank generation."
)

EXPERT_TOKENS = _counter(
    "expert_tokens",
    "Tokens routed to an expert, on average over the routed linears; top-2 counts a token twice.",
    "expert",
)
EXPERT_IMBALANCE = _gauge(
    "expert_imbalance", "Tokens of the busiest expert over the mean of all, in the last interval; 0 without tokens."
)
GROUP_IMBALANCE = _gauge(
    "group_imbalance", "Routed tokens of the busiest group of ranks over the mean, in the last interval; 0 without."
)

RANK_REQUESTS = _gauge("rank_requests", "Requests in a rank: in its batches, or waiting for room.", "rank", "state")
KV_CACHE_USED = _gauge("kv_cache_used_ratio", "Part of a rank's KV cache that is taken, 0 to 1.", "rank")
EXCHANGE_BYTES = _counter("exchange_bytes", "Bytes a rank handed over for other ranks.", "rank", "kind")
EXCHANGE_SECONDS = _counter(
    "exchange_seconds", "A rank's time in exchanges, waiting for other ranks included.", "rank", "kind"
)
BANK_BYTES = _gauge("bank_bytes", "Memory of a rank's part of the bank.", "rank", "part")
BANK_GENERATION = _gauge("bank_generation", "The bank generation that new requests use.")
BANK_LIVE_GENERATIONS = _gauge("bank_live_generations", "Bank generations that the ranks hold.")
BANK_NEWEST_GENERATION = _gauge("bank_newest_generation", "The newest bank generation of all replicas.")
BANK_FOLLOW_FAILURES = _counter(
    "bank_follow_failures", "Failed tries to see, or to load, what another replica has made of the bank."
)
BANK_EXPERTS = _gauge("bank_experts", "Experts of the generation that new requests use.")

RANK_LOSSES = _counter("rank_losses", "Times that ranks were lost, which costs all of them.")
REBUILDS = _counter("rebuilds", "Attempts to start the ranks again.", "outcome")
REBUILD_SECONDS = _counter("rebuild_seconds", "Time without ranks, from each loss to their return.")

METRICS: Final = tuple(each for each in list(globals().values()) if isinstance(each, Metric))
"""The table: nothing else is written."""


NO_LABELS: Final[Labels] = {}


class Recorder(Protocol):
    """What metrics are written to. ``labels`` are those the metric has, all of them."""

    def add(self, metric: Metric, amount: float, labels: Labels = NO_LABELS) -> None:
        """Adds to a counter; 0 adds nothing."""

    def set(self, metric: Metric, value: float, labels: Labels = NO_LABELS) -> None:
        """Sets a gauge."""

    def observe(self, metric: Metric, value: float, labels: Labels = NO_LABELS) -> None:
        """Counts one observation in a histogram."""


class Nowhere:
    """A recorder for calls that nobody watches."""

    def add(self, metric: Metric, amount: float, labels: Labels = NO_LABELS) -> None:
        """Does nothing."""

    def set(self, metric: Metric, value: float, labels: Labels = NO_LABELS) -> None:
        """Does nothing."""

    def observe(self, metric: Metric, value: float, labels: Labels = NO_LABELS) -> None:
        """Does nothing."""


def outcome_of(status: int) -> str:
    """The label for how a call ended, by its HTTP status, or the one its gRPC status corresponds to."""
    named = {
        401: "denied",
        403: "denied",
        408: "timeout",
        429: "overloaded",
        499: "cancelled",
        503: "unavailable",
        504: "timeout",
    }
    if status in named:
        return named[status]
    return "ok" if status < 400 else "invalid" if status < 500 else "failed"
