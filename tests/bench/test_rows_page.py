"""Rows of benchmarks as bars: medians and ranges over runs, and what is no file of rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.support.shell import Shell

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capfd)


def charts(page: Path) -> dict[str, list[str]]:
    """Texts of every chart by its title."""
    svgs = (ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page.read_text(), flags=re.DOTALL))
    texts = [[str(one.text) for one in svg.iter("text")] for svg in svgs]
    return {title: rest for title, *rest in texts}


def test_several_runs_become_medians_with_ranges(shell: Shell, tmp_path: Path) -> None:
    files = []
    for run, speed in enumerate((10.0, 30.0, 20.0)):
        rows = [{"mode": mode, "batch": 8, "tokens_per_s": speed + extra} for mode, extra in (("base", 0), ("auto", 5))]
        files.append(tmp_path / f"run-{run}.json")
        files[-1].write_text(json.dumps(rows))
    out = tmp_path / "x.html"
    said = shell("report", "bench", *files, "--out", out)
    assert (said.code, said.out) == (0, f"{out}: 6 rows\n")
    assert charts(out) == {"tokens_per_s": ["base", "20", "auto", "25"]}
    base, auto = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", out.read_text())[0]).iter("line")
    assert float(auto.attrib["x2"]) > float(base.attrib["x2"])


@pytest.mark.parametrize("file", ["capacity", "chaos", "decode", "kernels", "load", "scaling"])
def test_what_our_benchmarks_wrote_can_be_drawn(shell: Shell, tmp_path: Path, file: str) -> None:
    out = tmp_path / "x.html"
    assert shell("report", "bench", RESULTS / f"{file}-epyc-2-cores.json", "--out", out).code == 0
    assert charts(out)


def test_percentiles_are_one_bar(shell: Shell, tmp_path: Path) -> None:
    out, file = tmp_path / "x.html", tmp_path / "rows.json"
    file.write_text(json.dumps([{"model": "all", "ttft_ms": {"p50": 5.0, "p90": 7.0, "p99": 1500.0}}]))
    assert shell("report", "bench", file, "--out", out).code == 0
    assert charts(out) == {"ttft_ms": ["None", "5"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("{", "is not valid JSON"),
        ("{}", "is no list of rows"),
        ("[]", "is no list of rows"),
        ("[1]", "is no list of rows"),
        ('[{"mode": "x"}]', "hold no measured numbers"),
    ],
)
def test_what_is_no_file_of_rows(shell: Shell, tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "rows.json"
    if content is not None:
        file.write_text(content)
    said = shell("report", "bench", file, "--out", tmp_path / "x.html")
    assert said.code == 1
    assert message in said.err
