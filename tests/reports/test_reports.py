"""Pages are whole, load nothing and escape what they show; charts put numbers where they belong."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from meteora_dist.reports.charts import Bar, Cell, Curve, bars, cells, lines
from meteora_dist.reports.page import note, page, section, table
from meteora_dist.reports.palette import OKABE_ITO, colour_of
from meteora_dist.reports.tokens import Coloured, coloured, legend

EVIL = '<script src="https://x">&'


def test_everything_a_page_shows_is_escaped_and_nothing_is_loaded() -> None:
    parts = [
        note(EVIL),
        section(EVIL, table((EVIL,), [(EVIL,)])),
        coloured([Coloured(EVIL, 0, EVIL), Coloured(EVIL, None, "")]),
        legend([EVIL], [0]),
        bars(EVIL, [Bar(EVIL, 1, 1, 1)]),
        lines(EVIL, EVIL, EVIL, [Curve(EVIL, [(0, 1)])]),
        cells([EVIL], [EVIL], [[Cell("#000000", 1, EVIL)]]),
    ]
    html = page(EVIL, parts)
    assert "<script" not in html
    assert not re.search(r"<(?:link|img|iframe|object)|url\(|@import", html)
    assert "default-src 'none'" in html
    assert html.count("&lt;script src=&quot;https://x&quot;&gt;&amp;") >= 12
    ElementTree.fromstring(re.sub(r"<!doctype html>|<meta[^>]*>", "", html))


def test_bars_are_as_long_as_their_numbers_and_their_ranges_lie_on_them() -> None:
    svg = ElementTree.fromstring(bars("t", [Bar("a", 10, 5, 20), Bar("b", 20, 20, 20)]))
    short, long = (float(one.attrib["width"]) for one in svg.iter("rect"))
    assert long == 2 * short
    (line,) = svg.iter("line")
    start = float(next(svg.iter("rect")).attrib["x"])
    assert [float(line.attrib[name]) - start for name in ("x1", "x2")] == [short / 2, 2 * short]


def test_a_map_leaves_out_cells_without_a_colour() -> None:
    svg = ElementTree.fromstring(cells(["r"], ["a", "b"], [[Cell("", 0, ""), Cell(colour_of(1), 0.5, "said")]]))
    (rect,) = svg.iter("rect")
    assert (rect.attrib["fill"], rect.attrib["fill-opacity"]) == (OKABE_ITO[1], "0.50")
    assert rect[0].text == "said"


def test_lines_begin_at_zero() -> None:
    svg = ElementTree.fromstring(lines("t", "x", "y", [Curve("c", [(0, 0), (4, 2)])]))
    (line,) = svg.iter("polyline")
    assert line.attrib["points"] == "60.0,200.0 550.0,30.0"
