"""A load as one HTML page: its numbers, curves of its waiting times, and what happened second by second.

The page is a single file of HTML and SVG; it loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from meteora_dist.bench.load import OK, REJECTED, Call
from meteora_dist.bench.load_report import LoadRow, Percentiles, report

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 560, 240, 60, 30, 40
_COLOURS = ("#1b6ca8", "#c8553d", "#3c7a3f")
_MOST_POINTS = 300
_TICKS = 5
_STYLE = (
    "body{font:14px sans-serif;margin:2em;max-width:1200px}table{border-collapse:collapse}"
    "td,th{padding:.3em .8em;border-bottom:1px solid #ccc;text-align:right}"
    "td:first-child,th:first-child{text-align:left}svg{margin:1em 1em 0 0}text{font:12px sans-serif}"
)


class Curve(NamedTuple):
    """A named line through points."""

    name: str
    points: list[tuple[float, float]]


def page(title: str, calls: Sequence[Call]) -> str:
    """The whole page."""
    charts = [
        chart("Time to the first token", "ms", "% of answers", [Curve("TTFT", _shares(_ttft(calls)))]),
        chart("Between tokens", "ms", "% of gaps", [Curve("inter-token", _shares(_gaps(calls)))]),
        chart("Whole answers and refusals", "ms", "%", _ends(calls)),
        chart("Second by second", "s", "a second", _over_time(calls)),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1>{_table(report(calls))}{''.join(charts)}</html>\n"
    )


def chart(title: str, x_name: str, y_name: str, curves: Sequence[Curve]) -> str:
    """Lines over a common pair of axes that begin at zero, as SVG."""
    points = [point for curve in curves for point in curve.points]
    most_x = max((x for x, _ in points), default=0.0) or 1.0
    most_y = max((y for _, y in points), default=0.0) or 1.0
    right, floor = _WIDTH - 10, _HEIGHT - _BOTTOM

    def across(x: float) -> str:
        return f"{_LEFT + x / most_x * (right - _LEFT):.1f}"

    def down(y: float) -> str:
        return f"{floor - y / most_y * (floor - _TOP):.1f}"

    parts = [f'<text x="{_LEFT}" y="16" font-weight="bold">{escape(title)}</text>']
    for tick in range(_TICKS + 1):
        x, y = most_x * tick / _TICKS, most_y * tick / _TICKS
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{down(y)}" y2="{down(y)}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{down(y)}" text-anchor="end">{y:.3g}</text>')
        parts.append(f'<text x="{across(x)}" y="{floor + 16}" text-anchor="middle">{x:.3g}</text>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 6}" text-anchor="end">{escape(x_name)}; {escape(y_name)}</text>')
    for number, curve in enumerate(curves):
        colour = _COLOURS[number % len(_COLOURS)]
        line = " ".join(f"{across(x)},{down(y)}" for x, y in curve.points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        at = _LEFT + 170 * number
        parts.append(f'<text x="{at}" y="{_HEIGHT - 6}" fill="{colour}">{escape(curve.name)}</text>')
    return f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img">{"".join(parts)}</svg>'


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
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = []
    for row in rows:
        cells = (
            *(row.model, row.requests, row.completed, row.rejected, sum(row.errors.values()), row.tokens_per_s),
            *map(shown, (row.ttft_ms, row.inter_token_ms, row.end_to_end_ms)),
        )
        lines.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    note = "Times are p50 / p90 / p99."
    return f"<table><tr>{head}</tr>{''.join(lines)}</table><p>{note}</p>"


def shown(times: Percentiles) -> str:
    """The three of them in a line."""
    return " / ".join("-" if one is None else f"{one:.0f}" for one in (times.p50, times.p90, times.p99))
