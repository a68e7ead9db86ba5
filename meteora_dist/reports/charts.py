"""Charts as SVG: lines, bars with ranges, and maps of cells."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from meteora_dist.reports.palette import colour_of

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 560, 240, 60, 30, 40
_TICKS = 5
_BAR, _BAR_LEFT, _BAR_RIGHT = 22, 330, 110
_CELL_WIDTH, _CELL_HEIGHT = 16, 13
_LETTER = 7


class Curve(NamedTuple):
    """A named line through points."""

    name: str
    points: list[tuple[float, float]]


class Bar(NamedTuple):
    """A named value, and the range that its repeats were in."""

    name: str
    value: float
    low: float
    high: float


class Cell(NamedTuple):
    """A cell of a map.

    Attributes:
        colour: ``#rrggbb``; empty for none.
        strength: How much of it, 0 to 1.
        said: What it says under the pointer.
    """

    colour: str
    strength: float
    said: str


def lines(title: str, x_name: str, y_name: str, curves: Sequence[Curve]) -> str:
    """Lines over a common pair of axes that begin at zero."""
    points = [point for curve in curves for point in curve.points]
    most_x = max((x for x, _ in points), default=0.0) or 1.0
    most_y = max((y for _, y in points), default=0.0) or 1.0
    right, floor = _WIDTH - 10, _HEIGHT - _BOTTOM

    def across(x: float) -> str:
        return f"{_LEFT + x / most_x * (right - _LEFT):.1f}"

    def down(y: float) -> str:
        return f"{floor - y / most_y * (floor - _TOP):.1f}"

    parts = [f'<text x="{_LEFT}" y="16" class="title">{escape(title)}</text>']
    for tick in range(_TICKS + 1):
        x, y = most_x * tick / _TICKS, most_y * tick / _TICKS
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{down(y)}" y2="{down(y)}" class="axis"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{down(y)}" text-anchor="end">{y:.3g}</text>')
        parts.append(f'<text x="{across(x)}" y="{floor + 16}" text-anchor="middle">{x:.3g}</text>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 6}" text-anchor="end">{escape(x_name)}; {escape(y_name)}</text>')
    for number, curve in enumerate(curves):
        line = " ".join(f"{across(x)},{down(y)}" for x, y in curve.points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour_of(number)}" stroke-width="2"/>')
        at = _LEFT + 130 * number
        parts.append(f'<rect x="{at}" y="{_HEIGHT - 16}" width="10" height="10" fill="{colour_of(number)}"/>')
        parts.append(f'<text x="{at + 14}" y="{_HEIGHT - 6}">{escape(curve.name)}</text>')
    return _svg(_WIDTH, _HEIGHT, parts)


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Lying bars from zero with the range of each, and its number at the end."""
    most = max((bar.high for bar in rows), default=0.0) or 1.0
    span = _WIDTH - 60
    parts = [f'<text x="0" y="16" class="title">{escape(title)}</text>']
    for number, bar in enumerate(rows):
        top = _TOP + number * _BAR
        value, low, high = (_BAR_LEFT + part / most * span for part in (bar.value, bar.low, bar.high))
        middle, after = top + _BAR / 2 - 2, max(value, high) + 8
        parts += [
            f'<text x="{_BAR_LEFT - 8}" y="{middle + 4}" text-anchor="end">{escape(bar.name)}</text>',
            f'<rect x="{_BAR_LEFT}" y="{top}" width="{max(value - _BAR_LEFT, 0):.1f}" height="{_BAR - 5}" '
            f'fill="{colour_of(1)}"/>',
            *(
                [f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="{colour_of(3)}"/>']
                if high > low
                else []
            ),
            f'<text x="{after:.1f}" y="{middle + 4}">{_number(bar.value)}</text>',
        ]
    return _svg(_BAR_LEFT + span + _BAR_RIGHT, _TOP + len(rows) * _BAR + 10, parts)


def cells(row_names: Sequence[str], column_names: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A map of coloured cells, a named row below the other, the columns' names above them, turned."""
    head, left = (_LETTER * max(map(len, names), default=0) + 12 for names in (column_names, row_names))
    parts = []
    for column, name in enumerate(column_names):
        at = left + column * _CELL_WIDTH + _CELL_WIDTH / 2 + 4
        parts.append(f'<text transform="translate({at},{head - 4}) rotate(-90)">{escape(name)}</text>')
    for number, (name, row) in enumerate(zip(row_names, rows, strict=True)):
        top = head + number * _CELL_HEIGHT
        parts.append(f'<text x="{left - 6}" y="{top + _CELL_HEIGHT - 2}" text-anchor="end">{escape(name)}</text>')
        parts += [
            f'<rect x="{left + column * _CELL_WIDTH}" y="{top}" width="{_CELL_WIDTH - 1}" '
            f'height="{_CELL_HEIGHT - 1}" fill="{cell.colour}" fill-opacity="{cell.strength:.2f}">'
            f"<title>{escape(cell.said)}</title></rect>"
            for column, cell in enumerate(row)
            if cell.colour
        ]
    return _svg(left + len(column_names) * _CELL_WIDTH + 10, head + len(rows) * _CELL_HEIGHT + 6, parts)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return f'<svg width="{width:.0f}" height="{height:.0f}" role="img">{"".join(parts)}</svg>'
