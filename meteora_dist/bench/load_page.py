"""A load as one HTML page: its numbers, curves of its waiting times, and what happened second by second.

The page is a single file of HTML and SVG; it loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from meteora_dist.bench.load import OK, REJECTED, Call
from meteora_dist.bench.load_report import LoadRow, Percentiles, report
from meteora_dist.reports.charts import Curve, lines
from meteora_dist.reports.page import note, table
from meteora_dist.reports.page import page as whole_page

_MOST_POINTS = 300


def page(title: str, calls: Sequence[Call]) -> str:
    """The whole page."""
    charts = (
        lines("Time to the first token", "ms", "% of answers", [Curve("TTFT", _shares(_ttft(calls)))]),
        lines("Between tokens", "ms", "% of gaps", [Curve("inter-token", _shares(_gaps(calls)))]),
        lines("Whole answers and refusals", "ms", "%", _ends(calls)),
        lines("Second by second", "s", "a second", _over_time(calls)),
    )
    return whole_page(title, [_table(report(calls)), note("Times are p50 / p90 / p99."), *charts])


def _shares(seconds: Sequence[float]) -> list[tuple[float, float]]:
    """For every time in milliseconds how many, in percent, are no longer."""
    ordered = sorted(seconds)
    step = max(1, len(ordered) // _MOST_POINTS)
    ranks = [*range(0, len(ordered), step), len(ordered) - 1] if ordered else []
    return [(1000 * ordered[rank], 100 * (rank + 1) / len(ordered)) for rank in ranks]


def _ttft(calls: Sequence[Call]) -> list[float]:
    return [call.pieces[0] - call.began for call in calls if call.outcome == OK and call.pieces]


def _gaps(calls: Sequence[Call]) -> list[float]:
    return [late - early for call in calls for early, late in zip(call.pieces, call.pieces[1:], strict=False)]


def _ends(calls: Sequence[Call]) -> list[Curve]:
    times = {
        outcome: [call.ended - call.began for call in calls if call.outcome == outcome] for outcome in (OK, REJECTED)
    }
    names = {OK: "whole answers", REJECTED: "refusals (429)"}
    return [Curve(names[outcome], _shares(found)) for outcome, found in times.items() if found]


def _over_time(calls: Sequence[Call]) -> list[Curve]:
    began = min((call.began for call in calls), default=0.0)
    last = max((call.ended for call in calls), default=began)
    moments = {
        "pieces": [moment for call in calls for moment in call.pieces],
        "refusals (429)": [call.ended for call in calls if call.outcome == REJECTED],
        "errors": [call.ended for call in calls if call.outcome not in (OK, REJECTED)],
    }
    curves = []
    for name, found in moments.items():
        counts = [0] * (int(last - began) + 1)
        for moment in found:
            counts[int(moment - began)] += 1
        curves.append(Curve(name, [(float(second), float(count)) for second, count in enumerate(counts)]))
    return curves


def _table(rows: Sequence[LoadRow]) -> str:
    names = ("model", "requests", "whole", "429", "errors", "tokens/s", "TTFT ms", "inter-token ms", "end to end ms")
    lines_of = (
        (
            *(row.model, row.requests, row.completed, row.rejected, sum(row.errors.values()), row.tokens_per_s),
            *map(shown, (row.ttft_ms, row.inter_token_ms, row.end_to_end_ms)),
        )
        for row in rows
    )
    return table(names, lines_of)


def shown(times: Percentiles) -> str:
    """The three of them in a line."""
    return " / ".join("-" if one is None else f"{one:.0f}" for one in (times.p50, times.p90, times.p99))
