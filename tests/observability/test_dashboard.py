"""The Grafana dashboard and the table of metrics know each other: every name and label, in both directions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from meteora_dist.observability.metrics import METRICS

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana" / "meteora.json"

OF_RAY = {"application", "deployment", "replica", "WorkerId", "NodeAddress", "SessionName", "Component", "Version"}
OF_HISTOGRAMS = {"le"}
WORDS = {"by", "without", "and", "or", "unless", "on", "ignoring", "offset", "bool"}
TOKEN = re.compile(
    r"""(?P<string>"(?:[^"\\]|\\.)*")
      | (?P<range>\[[^\]]*\])
      | (?P<name>[A-Za-z_:][A-Za-z0-9_:]*)
      | (?P<number>\d+(?:\.\d+)?)
      | (?P<sign>[=!]~|!=|[-+*/(){},=<>])
      | (?P<space>\s+)""",
    re.VERBOSE,
)


def tokens(expression: str) -> list[tuple[str, str]]:
    """The kind and text of each; AssertionError for what PromQL does not have."""
    found, place = [], 0
    while place < len(expression):
        match = TOKEN.match(expression, place)
        assert match is not None, f"cannot read {expression[place:]!r}"
        found.append((str(match.lastgroup), match[0]))
        place = match.end()
    return [token for token in found if token[0] != "space"]


def used(expression: str) -> tuple[set[str], set[str]]:
    """The metrics and the labels it uses."""
    metrics: set[str] = set()
    labels: set[str] = set()
    inside: list[str] = []
    read = tokens(expression)
    for index, (kind, text) in enumerate(read):
        following = read[index + 1][1] if index + 1 < len(read) else ""
        if text in "({":
            grouping = index > 0 and read[index - 1][1] in WORDS
            inside.append("labels" if text == "{" or grouping else "terms")
        elif text in ")}":
            inside.pop()
        elif kind == "name" and inside and inside[-1] == "labels":
            labels.add(text)
        elif kind == "name" and text not in WORDS and following != "(" and following not in WORDS:
            metrics.add(text)
    assert not inside, f"unbalanced: {expression}"
    return metrics, labels


def expressions(value: Any) -> Iterator[str]:
    """All PromQL in the dashboard."""
    if isinstance(value, dict):
        if "expr" in value:
            yield value["expr"]
        for inner in value.values():
            yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def test_the_reader_reads_promql() -> None:
    text = 'histogram_quantile(0.5, sum by (le, a) (rate(m_bucket{b=~"x{y}", c!="d"}[5m]))) / max (n)'
    assert used(text) == ({"m_bucket", "n"}, {"le", "a", "b", "c"})


def test_every_name_and_label_of_the_dashboard_is_in_the_table(dashboard: Any) -> None:
    labels_of = {name: set(metric.labels) | OF_RAY for metric in METRICS for name in metric.exported}
    for expression in expressions(dashboard):
        names, labels = used(expression)
        assert names, expression
        assert names <= labels_of.keys(), expression
        assert labels <= set.intersection(*(labels_of[name] for name in names)) | OF_HISTOGRAMS, expression
        assert "le" not in labels or all(name.endswith("_bucket") for name in names), expression


def test_every_metric_of_the_table_is_on_the_dashboard(dashboard: Any) -> None:
    shown = {name for expression in expressions(dashboard) for name in used(expression)[0]}
    assert [metric.name for metric in METRICS if not shown & set(metric.exported)] == []


def test_counters_are_shown_as_rates_and_variables_exist(dashboard: Any) -> None:
    for expression in expressions(dashboard):
        for counter in re.findall(r"\w+_(?:total|bucket|sum|count)\b", expression):
            assert re.search(rf"(rate|increase)\({counter}", expression), expression
    variables = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", DASHBOARD.read_text())) <= variables
    for variable in dashboard["templating"]["list"][1:]:
        name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]).groups()  # type: ignore[union-attr]
        assert any(name in metric.exported and label in {*metric.labels, *OF_RAY} for metric in METRICS)


def test_legends_use_labels_of_their_expression(dashboard: Any) -> None:
    targets = [target for panel in dashboard["panels"] for target in panel.get("targets", [])]
    assert len(targets) > 30
    for target in targets:
        assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= used(target["expr"])[1], target


def test_panels_do_not_overlap(dashboard: Any) -> None:
    cells = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
