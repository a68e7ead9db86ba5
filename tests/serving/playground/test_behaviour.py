"""The page in Chromium, before an engine that says what the test tells it to: typing, streaming, errors, keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import pytest

from meteora_dist.engine.request import GenerationRequest, TokenEvent
from meteora_dist.errors import EngineUnavailable
from meteora_dist.moe.routing import BASE, RoutingChoice
from meteora_dist.serving.gate import Gate
from meteora_dist.serving.service import TextService
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.conftest import MakeService
from tests.serving.playground.conftest import Serve
from tests.serving.scripted import ScriptedEngine, says
from tests.support.browser import Browser, Page

CONTEXT = 512
COMPLETE = "document.querySelector('.pane').dataset.state === 'complete'"
FAILED = "document.querySelector('.pane').dataset.state === 'failed'"
READY = "document.querySelector('#status').dataset.state === 'ready'"


@dataclass
class Slow(ScriptedEngine):
    """Thinks about every token for 20 ms, and counts them."""

    said: int = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                await asyncio.sleep(0.02)
                self.said += 1
                yield event


def ask(page: Page, prompt: str = "Who answers?") -> None:
    page.wait(READY)
    page.type("#prompt", prompt)
    page.click("#run")


def test_a_prompt_is_typed_and_its_answer_streams(
    chromium: Browser, serve: Serve, make_service: MakeService, tokenizer: TextTokenizer
) -> None:
    answer = "1. Yes,\n2. <b>é</b>!"
    engine = says(tokenizer, answer)
    url = serve(make_service(engine, max_model_len=CONTEXT))
    page = chromium.open(url)
    page.wait(READY)
    assert page.text("#status") == "Ready: 4 experts"
    page.type("#prompt", "Who answers?")
    page.press("Enter", modifiers=2)
    page.wait(COMPLETE)
    # What a model says is text, whatever it looks like.
    assert page.text(".answer") == answer
    assert page.eval("document.querySelectorAll('.answer b').length") == 0
    (asked,) = engine.seen
    assert (asked.trace, asked.trace_layers, asked.max_tokens, asked.sampling.temperature) == (True, True, 128, 0)
    assert asked.routing == RoutingChoice()
    assert "Answer complete" in page.text("#live")
    assert page.on("#live", "it.getAttribute('aria-live')") == "polite"
    assert page.text(".pane .state").startswith("complete · ")
    assert page.complaints == []
    assert {request[: len(url)] for request in page.requests} == {url}
    page.close()


def test_tokens_are_seen_before_the_answer_is_complete(
    chromium: Browser, serve: Serve, make_service: MakeService, tokenizer: TextTokenizer
) -> None:
    engine = Slow(list(tokenizer.encode("yes " * 20)))
    page = chromium.open(serve(make_service(engine, max_model_len=CONTEXT)))
    ask(page)
    seen = page.wait("document.querySelectorAll('.t').length")
    assert seen < len(engine.tokens)
    assert page.on(".pane", "it.dataset.state") == "streaming"
    page.wait(COMPLETE)
    assert page.eval("performance.getEntriesByName('first-token').length") == 1
    page.close()


def test_stop_ends_the_generation(
    chromium: Browser, serve: Serve, make_service: MakeService, tokenizer: TextTokenizer
) -> None:
    engine = Slow(list(tokenizer.encode("yes " * 100)))
    page = chromium.open(serve(make_service(engine, max_model_len=CONTEXT)))
    assert page.on("#stop", "it.disabled")
    page.type("#max-tokens", "400")
    ask(page)
    page.wait("document.querySelectorAll('.t').length")
    page.click("#stop")
    page.wait("document.querySelector('.pane').dataset.state === 'stopped'")
    deadline = time.monotonic() + 10
    while not engine.closed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.closed == [engine.seen[0].request_id]
    assert engine.said < len(engine.tokens)
    assert page.on("#stop", "it.disabled")
    assert page.on(".pane .alert", "it.hidden")
    page.close()


def test_panes_ask_with_their_own_routing_and_the_same_seed(
    chromium: Browser, serve: Serve, make_service: MakeService, tokenizer: TextTokenizer
) -> None:
    engine = says(tokenizer, "yes")
    page = chromium.open(serve(make_service(engine, max_model_len=CONTEXT)))
    page.click("#compare")
    page.type(".pane .top-k", "3")
    page.type(".pane .gate-temperature", "20")
    page.type("#temperature", "0.7")
    ask(page)
    both = "[...document.querySelectorAll('.pane')].every(pane => pane.dataset.state === 'complete')"
    page.wait(both)
    first, second = sorted(engine.seen, key=lambda request: request.routing.mode)
    assert (first.routing, second.routing) == (RoutingChoice(top_k=3, temperature=20.0), BASE)
    assert first.sampling == second.sampling
    assert first.sampling.temperature == 0.7
    page.choose(".pane:nth-child(2) .mode", "blend…")
    page.type(".pane:nth-child(2) .blend-text", "wide:0.5,plain:0.25")
    ask(page)
    page.wait(both)
    assert RoutingChoice(mode="fixed", experts=((1, 0.5), (0, 0.25))) in [request.routing for request in engine.seen]
    assert page.complaints == []
    page.close()


@pytest.mark.parametrize(
    ("error", "field", "message", "advice"),
    [
        (None, ("#max-tokens", "9999"), "(400, context_length_exceeded)", "lower Max tokens"),
        (None, (".pane .gate-temperature", "1001"), "Routing.temperature is 1001.0, but must be between", ""),
        (EngineUnavailable("restarting"), None, "Restarting (200, engine_unavailable)", "run it again"),
        (RuntimeError("/srv/secret"), None, "internal_error", ""),
    ],
    ids=["too long", "out of range", "in the stream", "ours"],
)
def test_errors_are_shown_with_what_to_do(
    chromium: Browser,
    serve: Serve,
    make_service: MakeService,
    tokenizer: TextTokenizer,
    error: Exception | None,
    field: tuple[str, str] | None,
    message: str,
    advice: str,
) -> None:
    more: dict[str, Any] = {} if error is None else {"error": error}
    page = chromium.open(serve(make_service(says(tokenizer, "ye", **more), max_model_len=CONTEXT)))
    page.wait(READY)
    if field is not None:
        page.type(*field)
    ask(page)
    page.wait(FAILED)
    alert = ".pane .alert"
    assert page.on(alert, "it.getAttribute('role')") == "alert"
    assert message in page.text(alert)
    assert advice in page.text(alert)
    assert "secret" not in page.text("body")
    assert page.text(".answer") == ("ye" if error else "")
    page.close()


def test_a_service_that_is_gone_is_an_error_too(
    chromium: Browser, serve: Serve, make_service: MakeService, tokenizer: TextTokenizer
) -> None:
    page = chromium.open(serve(make_service(says(tokenizer, "yes"), max_model_len=CONTEXT)))
    page.wait(READY)
    page.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1, uploadThroughput=-1)
    ask(page)
    page.wait(FAILED)
    assert page.text(".pane .alert").startswith("The service cannot be reached")
    page.close()


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(
    chromium: Browser, serve: Serve, make_service: MakeService, tokenizer: TextTokenizer, gate: Gate
) -> None:
    service: TextService = make_service(says(tokenizer, "yes"), gate=gate, max_model_len=CONTEXT)
    url = serve(service)
    page = chromium.open(url)
    page.wait("document.querySelector('#status').dataset.state === 'failed'")
    assert "invalid_api_key" in page.text("#alert")
    assert page.eval("document.activeElement.id") == "key"
    page.type("#key", "wrong")
    page.press("Enter")
    page.wait("document.querySelector('#alert').textContent.includes('not known here')")
    page.type("#key", "wide")
    page.press("Enter")
    page.wait(READY)
    # This key may not let the gates choose: neither may the page offer it.
    options = page.eval("[...document.querySelectorAll('.mode option')].map(option => option.value)")
    assert options == ["base", "wide"]
    page.choose(".mode", "wide")
    ask(page)
    page.wait(COMPLETE)
    assert page.on("#alert", "it.hidden")
    assert page.eval("[JSON.stringify(localStorage), document.cookie]") == ["{}", ""]
    assert "wide" not in "".join(request.removeprefix(url) for request in page.requests)
    page.close()


def test_it_works_below_a_prefix(
    chromium: Browser, serve: Serve, make_service: MakeService, tokenizer: TextTokenizer
) -> None:
    url = serve(make_service(says(tokenizer, "yes"), max_model_len=CONTEXT), "/models/llm")
    page = chromium.open(url.removesuffix("/"))
    ask(page)
    page.wait(COMPLETE)
    assert page.complaints == []
    assert all(request.startswith(url.removesuffix("/")) for request in page.requests)
    page.close()


def test_events_are_read_wherever_the_stream_is_cut(
    chromium: Browser, serve: Serve, make_service: MakeService, tokenizer: TextTokenizer
) -> None:
    page = chromium.open(serve(make_service(says(tokenizer, ""))))
    script = """(async () => {
      const { events } = await import('./playground/api.js');
      const text = 'data: {"a":"é"}\\n\\n: note\\n\\ndata: x\\r\\n\\r\\ndata:y\\ndata: z\\n\\nrest';
      const bytes = new TextEncoder().encode(text);
      const seen = [];
      for (let size = 1; size <= bytes.length; size++) {
        const stream = new ReadableStream({ start(to) {
          for (let at = 0; at < bytes.length; at += size) to.enqueue(bytes.slice(at, at + size));
          to.close();
        } });
        const got = [];
        for await (const data of events(stream)) got.push(data);
        seen.push(JSON.stringify(got));
      }
      return [...new Set(seen)];
    })()"""
    assert page.eval(script) == ['["{\\"a\\":\\"é\\"}","x","y\\nz"]']
    page.close()
