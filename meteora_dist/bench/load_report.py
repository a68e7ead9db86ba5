"""Numbers of a load: throughput, percentiles of waiting times, errors by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from meteora_dist.bench.load import OK, REJECTED, Call

ALL = "all"


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Of a number of times, in milliseconds; None of no times.

    Attributes:
        p50: The median.
        p90: Nine of ten are no longer.
        p99: Likewise 99 of 100.
    """

    p50: float | None
    p90: float | None
    p99: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles:
        """By nearest rank."""
        ordered = sorted(seconds)
        ranks = (ceil(len(ordered) * share) - 1 for share in (0.5, 0.9, 0.99))
        return cls(*(round(1000 * ordered[rank], 2) if ordered else None for rank in ranks))


@dataclass(frozen=True, slots=True)
class LoadRow:
    """What came of the requests to one model, or to all.

    Attributes:
        model: Its name, or ``all``.
        requests: How many there were.
        completed: Whole answers.
        rejected: Refusals with 429.
        errors: Other failures, by HTTP status or name.
        duration_s: From the first request to the end of the last.
        prompt_tokens: Of all whole answers.
        completion_tokens: Of all whole answers.
        requests_per_s: Whole answers.
        tokens_per_s: Produced tokens of whole answers.
        ttft_ms: From a request to the first piece of its answer.
        inter_token_ms: Between a piece and the next; most endpoints send a piece for every token.
        end_to_end_ms: From a request to the end of its answer.
        reject_ms: From a request to its refusal with 429.
    """

    model: str
    requests: int
    completed: int
    rejected: int
    errors: dict[str, int]
    duration_s: float
    prompt_tokens: int
    completion_tokens: int
    requests_per_s: float
    tokens_per_s: float
    ttft_ms: Percentiles
    inter_token_ms: Percentiles
    end_to_end_ms: Percentiles
    reject_ms: Percentiles


def report(calls: Sequence[Call]) -> list[LoadRow]:
    """A row for all calls, and one for each model when there are several."""
    models = sorted({call.model for call in calls})
    rows = [_row(ALL, calls)]
    if len(models) > 1:
        rows += [_row(model, [call for call in calls if call.model == model]) for model in models]
    return rows


def first_words(calls: Sequence[Call]) -> dict[str, str]:
    """What the endpoint said the first time, for each kind of failure but 429."""
    failed = [call for call in calls if call.outcome not in (OK, REJECTED)]
    return {call.outcome: call.detail for call in reversed(failed)}


def _row(model: str, calls: Sequence[Call]) -> LoadRow:
    whole = [call for call in calls if call.outcome == OK]
    rejected = [call for call in calls if call.outcome == REJECTED]
    errors = Counter(call.outcome for call in calls if call.outcome not in (OK, REJECTED))
    duration = max((call.ended for call in calls), default=0.0) - min((call.began for call in calls), default=0.0)
    tokens = sum(call.completion_tokens for call in whole)
    return LoadRow(
        model=model,
        requests=len(calls),
        completed=len(whole),
        rejected=len(rejected),
        errors=dict(sorted(errors.items())),
        duration_s=round(duration, 3),
        prompt_tokens=sum(call.prompt_tokens for call in whole),
        completion_tokens=tokens,
        requests_per_s=round(len(whole) / duration, 3) if duration else 0.0,
        tokens_per_s=round(tokens / duration, 2) if duration else 0.0,
        ttft_ms=Percentiles.of([call.pieces[0] - call.began for call in whole if call.pieces]),
        inter_token_ms=Percentiles.of(
            [late - early for call in whole for early, late in zip(call.pieces, call.pieces[1:], strict=False)]
        ),
        end_to_end_ms=Percentiles.of([call.ended - call.began for call in whole]),
        reject_ms=Percentiles.of([call.ended - call.began for call in rejected]),
    )
