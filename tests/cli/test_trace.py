"""``meteora trace``: the page has every token and layer, is whole, and loads nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from meteora_dist.cli.trace.page import trace_page
from meteora_dist.client import RoutingTrace, TokenRouting
from meteora_dist.reports.palette import colour_of
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.conftest import MakeService, make_service, tokenizer
from tests.serving.scripted import says
from tests.support.http import running
from tests.support.shell import Shell

__all__ = ["make_service", "tokenizer"]


@pytest.fixture
def url(make_service: MakeService, tokenizer: TextTokenizer) -> Iterator[str]:
    with running(create_api(make_service(says(tokenizer, "yes")))) as base:
        yield base.removesuffix("/v1")


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capfd)


def test_page_picture_and_json(url: str, shell: Shell, tmp_path: Path) -> None:
    html, png = tmp_path / "x.html", tmp_path / "x.png"
    said = shell("trace", "who?", "--url", url, "--out", html, "--png", png, "--max-tokens", 8)
    assert (said.code, said.out) == (0, f"yes\n\n{html}, {png}: 4 tokens, wide\n")
    page = html.read_text()
    assert not re.search(r"https?://|src=|url\(|<script|<link", page)
    shares, layers = (ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert len(list(shares.iter("rect"))) == 4 * 4
    assert len(list(layers.iter("rect"))) == 4 * 2  # the third layer has no expert
    assert [one.text for one in layers.iter("text")][4:] == ["layer 0", "layer 1", "layer 2"]
    first = next(layers.iter("rect"))
    assert (first.attrib["fill"], first.attrib["fill-opacity"]) == (colour_of(1), "0.75")
    with Image.open(png) as picture:
        assert picture.width > 300
    found = json.loads(shell("trace", "who?", "--url", url, "--max-tokens", 8, "--json").out)
    assert (found["text"], found["dominating"], found["prompt"]) == ("yes", "wide", "who?")
    assert found["tokens"][0]["layer_experts"] == [1, 3, -1]


def test_without_layers_and_with_text_that_looks_like_html() -> None:
    tokens = (TokenRouting("<b>&", 1, (0.2, 0.8)), TokenRouting("\n", 2, (0.0, 0.0)))
    page = trace_page("<script>alert(1)</script>", "auto", RoutingTrace(("a<i>", "b"), tokens, "b"))
    assert not re.search(r"<b>|<i>|<script", page)
    assert "&lt;b&gt;&amp;" in page
    assert "b 80%, a&lt;i&gt; 20%" in page
    assert page.count("<svg") == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("trace", 2, "Missing argument"),
        ("trace q --url nowhere", 1, "must start with http://"),
        ("trace q --url URL --model nobody", 1, "there is no model 'nobody'"),
        ("trace q --url URL --out NONE/x.html --max-tokens 4", 1, "cannot be written: No such file"),
        ("trace q --url URL --topk 0", 2, "--topk"),
    ],
)
def test_a_mistake_is_a_line(url: str, shell: Shell, tmp_path: Path, words: str, code: int, message: str) -> None:
    said = shell(*words.replace("URL", url).replace("NONE", str(tmp_path / "none")).split())
    assert said.code == code
    assert message in said.flat
