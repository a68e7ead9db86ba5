"""The page in Chromium, before an engine that computes: what it shows is what the API says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from meteora_dist.bank import Bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.rank import RankEngine
from meteora_dist.serving.catalog import Catalog
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.limits import Limits
from meteora_dist.serving.service import TextService
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.lone import LoneWorld
from tests.serving.playground.conftest import Serve
from tests.support.browser import Browser, Page
from tests.support.tiny import LAYERS

PROMPT = "Who answers?"
TOKENS = 40
DONE = "[...document.querySelectorAll('.pane')].every(pane => ['complete', 'cut'].includes(pane.dataset.state))"
SPANS = (
    "[...document.querySelectorAll('.t')].map(t => ({text: t.textContent, slot: t.dataset.slot, key: t.dataset.key}))"
)
CELLS = """(() => {
  const strip = document.querySelector('.strip');
  const [columns, layers, row] = [18, %d, 14];
  return [...Array(%d).keys()].map(token => [...Array(layers).keys()].map(layer => {
    const canvas = strip.querySelectorAll('canvas')[Math.floor(token / 32)];
    const at = [(token %% 32) * columns + 4, row * (layers - layer) - 6, 1, 1];
    return [...canvas.getContext('2d').getImageData(...at).data];
  }));
})()"""


@pytest.fixture(scope="module")
def engine(tiny_base: Path, tiny_bank: Bank) -> Iterator[RankEngine]:
    engine = RankEngine(EngineConfig(model=tiny_base, bank=tiny_bank.path))
    yield engine
    engine.stop()


@pytest.fixture
def service(engine: RankEngine, tiny_base: Path, tiny_bank: Bank) -> TextService:
    config = ServiceConfig(model=tiny_base, bank=tiny_bank.path, access="open")
    world: Any = LoneWorld(engine, config)
    gate = Gate(None, anonymous=True)
    return TextService(world, TextTokenizer.open(tiny_base), Catalog(tiny_bank.manifest), Limits(256), gate)


def traced(url: str, **more: Any) -> dict[str, Any]:
    """The API's own word on what the page asks."""
    body = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": TOKENS}
    got = httpx.post(f"{url}v1/chat/completions", json=body | {"routing": {"trace": "layers"}} | more, timeout=60)
    routing: dict[str, Any] = got.json()["choices"][0]["routing"]
    return routing


def ask(page: Page) -> None:
    page.type("#prompt", PROMPT)
    page.type("#max-tokens", str(TOKENS))
    page.press("Enter", modifiers=2)
    page.wait(DONE)


def dominating(routing: dict[str, Any], token: dict[str, Any]) -> int:
    return int(token["shares"].index(max(token["shares"])))


def test_tokens_legend_and_heat_map_are_those_of_the_trace(
    chromium: Browser, serve: Serve, service: TextService
) -> None:
    url = serve(service)
    routing = traced(url)
    tokens = routing["tokens"]
    experts = [dominating(routing, token) for token in tokens]
    assert len(set(experts)) > 1, "one expert alone would prove little"
    page = chromium.open(url)
    ask(page)
    spans = page.eval(SPANS)
    assert [span["text"] for span in spans] == [token["token"] for token in tokens]
    assert [int(span["slot"]) for span in spans] == experts
    letters = ["ABCD"[now] if now != before else None for before, now in pairwise([-1, *experts])]
    assert [span.get("key") for span in spans] == letters
    shares = page.eval("[...document.querySelectorAll('.legend .share')].map(share => share.textContent)")
    means = [sum(token["shares"][index] for token in tokens) / len(tokens) for index in range(4)]
    assert [int(share[:-1]) for share in shares] == [pytest.approx(100 * mean, abs=0.51) for mean in means]
    palette = page.eval(
        "[0,1,2,3].map(n => getComputedStyle(document.documentElement).getPropertyValue(`--painted-${n}`)"
        ".match(/\\d+/g).map(Number))"
    )
    # Reading pixels back makes Chromium complain of the test.
    assert page.complaints == []
    cells = page.eval(CELLS % (LAYERS, len(tokens)))
    for token, column in zip(tokens, cells, strict=True):
        pairs = zip(token["layer_experts"], token["layer_shares"], column, strict=True)
        for expert, share, (*colour, opacity) in pairs:
            assert colour == pytest.approx(palette[expert], abs=4)
            assert opacity == pytest.approx(255 * (0.25 + 0.75 * share), abs=2)
    assert page.text(".stats .count") == str(len(tokens))
    assert float(page.text(".stats .rate")) > 0
    page.close()


def test_a_token_tells_its_experts_to_the_mouse_and_to_the_keyboard(
    chromium: Browser, serve: Serve, service: TextService
) -> None:
    url = serve(service)
    routing = traced(url)
    token = routing["tokens"][0]
    best = sorted(zip(token["shares"], routing["experts"], strict=True), reverse=True)
    page = chromium.open(url)
    ask(page)
    page.hover(".t[data-n='0']")
    rows = page.eval("[...document.querySelectorAll('.tip li')].map(row => row.textContent)")
    for row, (share, name) in zip(rows, best, strict=False):
        assert name in row
        assert f"{round(100 * share)}%" in row
    page.hover("h1")
    assert page.on("#tip", "it.hidden")
    page.on(".answer", "it.focus()")
    page.press("ArrowRight")
    told = f"{best[0][1]} {round(100 * best[0][0])}%"
    assert told in page.text("#live")
    assert page.text("#live").startswith("Token 1, ")
    page.press("ArrowRight")
    assert page.text("#live").startswith("Token 2, ")
    page.press("Escape")
    assert page.on("#tip", "it.hidden")
    page.on(".scroll", "it.focus()")
    page.press("ArrowRight")
    page.press("ArrowUp")
    expert, share = token["layer_experts"][1], token["layer_shares"][1]
    assert page.on(".cell", "it.value") == (
        f"layer 1, {json.dumps(token['token'], ensure_ascii=False)}: "
        f"{'ABCD'[expert]} {routing['experts'][expert]}, {round(100 * share)}%"
    )
    assert page.complaints == []
    page.close()


def test_two_modes_side_by_side_answer_as_each_alone(chromium: Browser, serve: Serve, service: TextService) -> None:
    url = serve(service)
    page = chromium.open(url)
    page.click("#compare")
    page.choose(".pane:nth-child(1) .mode", "auto")
    page.type(".pane:nth-child(1) .top-k", "1")
    page.choose(".pane:nth-child(2) .mode", "rooted")
    ask(page)
    for number, asked in ((1, {"routing": {"trace": True, "top_k": 1}}), (2, {"model": "rooted"})):
        routing = traced(url, **asked)
        shown = page.eval(SPANS.replace("'.t'", f"'.pane:nth-child({number}) .t'"))
        assert [(span["text"], int(span["slot"])) for span in shown] == [
            (token["token"], dominating(routing, token)) for token in routing["tokens"]
        ]
    assert page.on(".pane:nth-child(2) .top-k", "it.disabled")
    page.click("#compare")
    assert page.eval("document.querySelectorAll('.pane').length") == 1
    assert page.complaints == []
    page.close()
