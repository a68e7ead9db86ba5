"""The load: what it sends, what it counts, and that it ends; against our own HTTP interface on a real socket."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse

from meteora_dist.bench.load import Call, LoadPlan, send
from meteora_dist.bench.load_page import page
from meteora_dist.bench.load_report import Percentiles, first_words, report
from meteora_dist.cli.main import main
from meteora_dist.errors import InvalidRequest
from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.tokenizer import TextTokenizer
from tests.serving.conftest import MakeService, make_service, tokenizer
from tests.serving.scripted import ScriptedEngine, says
from tests.support.http import running

__all__ = ["make_service", "tokenizer"]


def test_every_request_is_counted_once(make_service: MakeService, tokenizer: TextTokenizer) -> None:
    engine = says(tokenizer, "yes")
    with running(create_api(make_service(engine, live=4))) as url:
        plan = LoadPlan(url, ("auto", "base", "auto"), 4, requests=12, prompt_tokens=4, answer_tokens=3)
        calls = asyncio.run(send(plan))
    rows = report(calls)
    assert [(row.model, row.requests, row.completed) for row in rows] == [
        ("all", 12, 12),
        ("auto", 8, 8),
        ("base", 4, 4),
    ]
    assert [(row.rejected, row.errors, row.completion_tokens) for row in rows] == [
        (0, {}, 36),
        (0, {}, 24),
        (0, {}, 12),
    ]
    assert len({asked.prompt_ids for asked in engine.seen}) == 12
    for call in calls:
        assert len(call.pieces) == 3
        assert call.began < call.pieces[0] < call.pieces[2] <= call.ended
    # The duration is given in whole milliseconds, and may be few of them.
    assert 36 / rows[0].tokens_per_s == pytest.approx(rows[0].duration_s, abs=0.001)


def test_chat_ignoring_the_end(make_service: MakeService, tokenizer: TextTokenizer) -> None:
    engine = says(tokenizer, "yes")
    with running(create_api(make_service(engine))) as url:
        plan = LoadPlan(url, ("wide",), 1, requests=1, prompt_tokens=2, answer_tokens=3, chat=True, ignore_eos=True)
        (call,) = asyncio.run(send(plan))
    assert (call.outcome, call.completion_tokens, engine.seen[0].ignore_eos) == ("ok", 3, True)


def test_refusals_and_failures_are_told_apart() -> None:
    app, answers = FastAPI(), iter(range(100))
    good = 'data: {"choices": [{"text": "a"}]}\n\n'

    @app.post("/v1/completions")
    async def answer() -> Response:
        number = next(answers)
        if number == 0:
            return JSONResponse({}, 429, {"Retry-After": "0"})
        if number == 1:
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        body = {2: good, 3: good + 'data: {"error": {"message": "it broke"}}\n\n', 4: "data: {\n\n"}
        return StreamingResponse(iter([body.get(number, good + "data: [DONE]\n\n")]), media_type="text/event-stream")

    with running(app) as url:
        plan = LoadPlan(url, ("any",), 1, requests=6)
        calls = asyncio.run(send(plan))
    (row,) = report(calls)
    assert (row.requests, row.completed, row.rejected) == (6, 1, 1)
    assert row.errors == {"404": 1, "error in stream": 1, "unreadable": 2}
    assert row.reject_ms.p99 is not None
    assert "no such model" in first_words(calls)["404"]
    assert row.completion_tokens == 1  # counted here, since the endpoint did not say


def test_it_ends_when_its_time_is_over_and_when_nobody_is_there(
    make_service: MakeService, tokenizer: TextTokenizer
) -> None:
    with running(create_api(make_service(says(tokenizer, "yes")))) as url:
        started = time.monotonic()
        calls = asyncio.run(send(LoadPlan(url, ("auto",), 2, None, 0.5, prompt_tokens=2, answer_tokens=2)))
        assert 0.5 <= time.monotonic() - started < 5
        assert len(calls) > 2
    (lost,) = asyncio.run(send(LoadPlan(url, ("auto",), 1, 1)))
    assert lost.outcome == "ConnectError"
    with running(create_api(make_service(says(tokenizer, "yes", pause=asyncio.Event())))) as url:
        (late,) = asyncio.run(send(LoadPlan(url, ("auto",), 1, 1, prompt_tokens=2, answer_tokens=2, timeout_s=0.2)))
    assert late.outcome == "timeout"
    for wrong in ({"requests": None}, {"models": ()}, {"url": "127.0.0.1"}):
        with pytest.raises(InvalidRequest):
            LoadPlan(**{"url": url, "models": ("auto",), **wrong})  # type: ignore[arg-type]


def test_callers_begin_one_after_the_other() -> None:
    app = FastAPI()

    @app.post("/v1/completions")
    async def answer() -> Response:
        await asyncio.sleep(1.0)
        return StreamingResponse(iter(["data: [DONE]\n\n"]), media_type="text/event-stream")

    with running(app) as url:
        calls = asyncio.run(send(LoadPlan(url, ("any",), 3, requests=3, ramp_s=0.6)))
    first, second, third = sorted(call.began for call in calls)
    assert second - first > 0.15
    assert third - second > 0.15


def test_lengths_vary_within_the_spread_and_repeat() -> None:
    plan = LoadPlan("http://host/v1", ("any",), prompt_tokens=20, answer_tokens=10, spread=0.5)
    bodies = [plan.body(number) for number in range(200)]
    assert {body["max_tokens"] for body in bodies} == set(range(5, 11))
    assert {len(body["prompt"].split()) for body in bodies} == set(range(10, 21))
    assert bodies[7] == plan.body(7)
    with pytest.raises(InvalidRequest, match="spread"):
        LoadPlan("http://host/v1", ("any",), spread=1.0)


def test_percentiles_are_of_the_nearest_rank() -> None:
    assert Percentiles.of([second / 1000 for second in range(1, 101)]) == Percentiles(50.0, 90.0, 99.0)
    assert Percentiles.of([0.002]) == Percentiles(2.0, 2.0, 2.0)
    assert Percentiles.of([]) == Percentiles(None, None, None)


def test_the_page_is_whole_and_loads_nothing() -> None:
    calls = [
        Call("<b>", float(start), start + 2.0, pieces=[start + 0.5, start + 1.0, start + 1.5], completion_tokens=3)
        for start in range(3)
    ]
    calls.append(Call("base", 1.0, 1.1, "429"))
    for shown in (calls, []):
        html = page("a & b", shown)
        assert "a &amp; b" in html
        assert "<b>" not in html
        assert not re.search(r"https?://|src=|url\(|<script|<link", html)
        svgs = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
        assert len(svgs) == 4
        for svg in svgs:
            ElementTree.fromstring(svg)
    lines = ElementTree.fromstring(re.findall(r"<svg.*?</svg>", page("t", calls), flags=re.DOTALL)[0])
    (line,) = lines.iter("polyline")
    assert line.attrib["points"].split()[-1] == "550.0,30.0"  # all of them by the longest time


def test_the_command_writes_rows_and_page_and_fails_when_a_request_did(
    make_service: MakeService, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, html = tmp_path / "load.json", tmp_path / "load.html"

    def command(url: str, *more: str) -> int:
        words = ["meteora", "bench", "serve", url, "--requests", "4", "--concurrency", "2", "--prompt-tokens", "2"]
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as end:
            main()
        assert isinstance(end.value.code, int)
        return end.value.code

    engine: ScriptedEngine = says(tokenizer, "yes")
    with running(create_api(make_service(engine))) as url:
        assert command(url, "--json", str(file), "--plot", str(html)) == 0
        (row,) = json.loads(file.read_text())
        assert (row["model"], row["completed"], row["errors"]) == ("all", 4, {})
        assert set(row["ttft_ms"]) == {"p50", "p90", "p99"}
        assert html.read_text().startswith("<!doctype html>")
        assert command(url, "--model", "nobody") == 1
