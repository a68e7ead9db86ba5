"""What ``meteora bench --json`` wrote, as one HTML page of bars.

Rows of several runs may be put together: rows that were measured under the same conditions become one bar, their
median, with the range they were in.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from meteora_dist.adapters.files import MAX_JSON_BYTES
from meteora_dist.errors import InvalidRequest
from meteora_dist.reports.charts import Bar, bars
from meteora_dist.reports.page import note, page, section

CONDITIONS = frozenset(
    {"batch", "ep", "experts", "layers", "rank", "repeats", "requests", "streams", "threads", "tokens", "top_k", "tp"}
)
"""Whole numbers that say under what conditions a row was measured; so do all texts and truth values."""

_PERCENTILES = ("p50", "p90", "p99")

Row = Mapping[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a file.

    Raises:
        InvalidRequest: It cannot be read, or is no JSON list of objects.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InvalidRequest(f"{path} has {path.stat().st_size} bytes; at most {MAX_JSON_BYTES} are read")
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise InvalidRequest(f"{path}: {cause.strerror}") from cause
    except ValueError as cause:
        raise InvalidRequest(f"{path} is not valid JSON ({cause})") from cause
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise InvalidRequest(f"{path} is no list of rows, as `meteora bench ... --json` writes")
    return rows


def rows_page(title: str, rows: Sequence[Row]) -> str:
    """The page: a section a measure, a chart a number.

    Raises:
        InvalidRequest: No row holds a number that was measured.
    """
    measures: dict[str, list[Row]] = {}
    for row in rows:
        measures.setdefault(str(row.get("measure", "")), []).append(row)
    parts = [section(measure or "Measured", *_charts(found)) for measure, found in measures.items() if _charts(found)]
    if not parts:
        raise InvalidRequest("the rows hold no measured numbers")
    explained = (
        "A bar is the median of the rows under equal conditions, its line their range; of percentiles, p50 to p99."
    )
    return page(title, [note(explained), *parts])


def _charts(rows: Sequence[Row]) -> list[str]:
    varying = [name for name in dict.fromkeys(name for row in rows for name in row) if _varies(name, rows)]
    names = dict.fromkeys(name for row in rows for name, value in row.items() if _numbers(name, value))
    return [bars(name, _bars(name, rows, varying)) for name in names]


def _bars(name: str, rows: Sequence[Row], varying: Sequence[str]) -> list[Bar]:
    """Of one number, in the rows' order."""
    found: dict[str, list[Sequence[float]]] = {}
    for row in rows:
        if values := _numbers(name, row.get(name)):
            found.setdefault(_label(row, varying), []).append(values)
    return [
        Bar(label, median(one[0] for one in many), min(map(min, many)), max(map(max, many)))
        for label, many in found.items()
    ]


def _varies(name: str, rows: Iterable[Row]) -> bool:
    """Whether ``name`` is a condition that is not the same in all rows."""
    values = [row.get(name) for row in rows]
    return any(_is_condition(name, value) for value in values) and len(set(map(str, values))) > 1


def _is_condition(name: str, value: object) -> bool:
    return isinstance(value, str | bool) or (isinstance(value, int) and name in CONDITIONS)


def _numbers(name: str, value: Any) -> Sequence[float]:
    """What was measured, most typical first; nothing for conditions and the rest."""
    if isinstance(value, dict) and all(isinstance(value.get(key), int | float) for key in _PERCENTILES):
        return [float(value[key]) for key in _PERCENTILES]
    if isinstance(value, int | float) and not _is_condition(name, value):
        return [float(value)]
    return []


def _label(row: Row, varying: Sequence[str]) -> str:
    """The conditions in which a row differs from others: texts alone, numbers with their names."""
    parts = (str(row[name]) if isinstance(row[name], str) else f"{name} {row[name]}" for name in varying if name in row)
    return ", ".join(parts)
