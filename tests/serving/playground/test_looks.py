"""Whether everybody can read and operate the page: contrast, colour blindness, names, focus, width."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.conftest import MakeService
from tests.serving.playground.conftest import Serve
from tests.serving.scripted import says
from tests.support.browser import Browser, Json, Page

Colour = NDArray[np.float64]

COLOURS = 8
COMPLETE = "document.querySelector('.pane').dataset.state === 'complete'"
READ = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const painted = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const behind = element => {
    for (; element; element = element.parentElement) {
      const colour = painted(getComputedStyle(element).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const texts = [];
  for (const it of document.querySelectorAll('body *:not(script, noscript *)')) {
    const own = [...it.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!it.checkVisibility() || (!own && !it.placeholder && !it.value)) continue;
    texts.push([it.className || it.id || it.tagName, painted(getComputedStyle(it).color), behind(it)]);
  }
  const style = getComputedStyle(document.documentElement);
  const palette = [...Array(8).keys()].map(n => painted(style.getPropertyValue(`--painted-${n}`)));
  return { texts, palette, surface: behind(document.querySelector('.card')) };
})()"""
# Linear RGB as people see it who lack one kind of cone (Machado, Oliveira, Fernandes 2009, severity 1).
SIGHT = {
    "full": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(rgba: list[int]) -> Colour:
    value = np.array(rgba[:3]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG 2.2's ratio."""
    light, dark = sorted((float(linear(colour) @ TO_XYZ[1]) for colour in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def lab(rgb: Colour) -> Colour:
    """CIELAB of linear RGB, D65."""
    white = TO_XYZ @ np.ones(3)
    ratio = TO_XYZ @ rgb.clip(0, 1) / white
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.fixture
def page(chromium: Browser, serve: Serve, make_service: MakeService, tokenizer: TextTokenizer) -> Iterator[Page]:
    """The page with an answer on it, and an error."""
    page = chromium.open(serve(make_service(says(tokenizer, "Yes, indeed."), max_model_len=512)))
    page.wait("document.querySelector('#status').dataset.state === 'ready'")
    page.type("#prompt", "Who answers?")
    page.click("#run")
    page.wait(COMPLETE)
    yield page
    page.close()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_contrast_and_colours(page: Page, dark: bool) -> None:
    page.theme(dark)
    page.on("#alert", "{ it.hidden = false; it.textContent = 'wrong'; }")
    page.hover(".t[data-n='1']")
    page.wait("!document.querySelector('#tip').hidden")
    seen = page.eval(READ)
    assert len(seen["texts"]) > 40
    for name, text, behind in seen["texts"]:
        assert contrast(text, behind) >= 4.5, f"{name}: {text} on {behind}"
    assert (max(seen["surface"][:3]) < 80) == dark
    colours = [linear(colour) for colour in seen["palette"]]
    for colour in seen["palette"]:
        assert contrast(colour, seen["surface"]) >= 3
    for sight, matrix in SIGHT.items():
        seen_as = [lab(np.array(matrix) @ colour) for colour in colours]
        nearest = min(float(np.linalg.norm(one - other)) for one, other in combinations(seen_as, 2))
        assert nearest >= 18, f"{sight}: two colours are {nearest:.0f} apart"


def test_everything_that_can_be_operated_has_a_name(page: Page) -> None:
    page.click("#compare")
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "spinbutton", "combobox", "checkbox", "switch", "region", "searchbox", "image")
    found = {
        (node["role"]["value"], node["name"]["value"]) for node in nodes if node.get("role", {}).get("value") in roles
    }
    assert all(name for _, name in found), found
    names = {name for _, name in found}
    assert {"Prompt", "Stop", "Side by side", "First answer", "Second answer", "Seed", "Top-k"} <= names
    headings = [node["name"]["value"] for node in nodes if node.get("role", {}).get("value") == "heading"]
    assert headings[0] == "meteora playground"
    assert page.eval("[document.documentElement.lang, document.title]") == ["en", "meteora playground"]


def test_the_tab_key_goes_down_the_page(page: Page) -> None:
    page.on(".skip", "it.focus()")
    order = []
    for _ in range(40):
        page.press("Tab")
        order.append(page.eval("document.activeElement.id || document.activeElement.className"))
        # A ring, of its own or around the switch beside it, shows where the reader is.
        ring = "getComputedStyle(it.id === 'compare' ? it.nextElementSibling : it).outlineStyle"
        assert page.on(":focus", ring) == "solid"
        if order[-1] == "scroll":
            break
    expected = ["key-toggle", "theme", "prompt", "run", "compare", "temperature", "max-tokens", "seed", "ignore-eos"]
    assert [one for one in order if one in expected] == expected
    assert order[-5:] == ["mode", "top-k", "gate-temperature", "answer", "scroll"]


@pytest.mark.parametrize("width", [320, 390, 768, 1280, 1920])
def test_no_width_makes_the_page_scroll_sideways(page: Page, width: int) -> None:
    for _ in range(2):
        page.resize(width, 844)
        wide = "[...document.querySelectorAll('main *')].filter(one => one.getBoundingClientRect().right > innerWidth)"
        assert page.eval("document.documentElement.scrollWidth") <= width, page.eval(
            f"{wide}.map(one => one.outerHTML.slice(0, 90))"
        )
        page.click("#compare")


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_what_an_empty_field_says_is_seen_whole(page: Page, width: int) -> None:
    page.resize(width, 844)
    page.choose(".mode", "auto")
    shown = hints(page.call("DOM.getDocument", depth=-1, pierce=True)["root"])
    assert {"random", "default"} <= {text for text, _ in shown}
    for text, place in shown:
        room = page.call("DOM.getBoxModel", backendNodeId=place)["model"]["width"]
        font = "getComputedStyle(document.querySelector('#seed')).font"
        needed = page.eval(
            f"(pen => (pen.font = {font}, pen.measureText('{text}').width))(document.createElement('canvas')"
            ".getContext('2d'))"
        )
        assert needed <= room, f"{text!r} needs {needed:.0f} px and has {room}"


def hints(node: Json) -> list[tuple[str, int]]:
    """Texts that stand in empty number fields, with the browser's own box for each."""
    attributes = node.get("attributes", [])
    named = dict(zip(attributes[::2], attributes[1::2], strict=True))
    if node["nodeName"] == "INPUT":
        if named.get("type") != "number" or "placeholder" not in named:
            return []
        (place,) = [
            one["backendNodeId"]
            for root in node["shadowRoots"]
            for one in root["children"]
            if "placeholder" in one.get("attributes", [])
        ]
        return [(named["placeholder"], place)]
    inner = [*node.get("children", []), *node.get("shadowRoots", [])]
    return [one for child in inner for one in hints(child)]


def test_nothing_moves_that_has_been_shown(
    chromium: Browser, serve: Serve, make_service: MakeService, tokenizer: TextTokenizer
) -> None:
    page = chromium.open(serve(make_service(says(tokenizer, "Yes. " * 20), max_model_len=512)), reduced_motion=True)
    page.eval(
        "window.moved = 0, new PerformanceObserver(list => list.getEntries().forEach(entry => window.moved += "
        "entry.value)).observe({type: 'layout-shift', buffered: true})"
    )
    page.wait("document.querySelector('#status').dataset.state === 'ready'")
    page.type("#prompt", "Who answers?")
    page.press("Enter", modifiers=2)
    page.wait(COMPLETE)
    assert page.eval("window.moved") < 0.1
    assert page.eval("getComputedStyle(document.querySelector('.switch span')).transitionDuration") == "0s"
    page.close()


def test_a_large_bank_gets_eight_colours_and_letters_for_all(page: Page) -> None:
    looks = page.eval(
        """(async () => {
          const { introduce, lookOf } = await import('./playground/palette.js?another');
          const names = [...Array(40).keys()].map(n => `expert-${n}`);
          introduce(names);
          return [...names].reverse().map(lookOf).concat([lookOf(null)]);
        })()"""
    )
    # Colours go to those that act first, not to those that come first in the bank.
    assert [look["slot"] for look in looks] == [*map(str, range(COLOURS)), *["more"] * 32, "none"]
    assert [look["key"] for look in looks[:3]] == ["A", "B", "C"]
    assert [look["key"] for look in looks[25:28]] == ["Z", "AA", "AB"]
    assert len({look["key"] for look in looks}) == 41
