"""Measures the playground in a headless Chromium, before a whole service with the demo bank; prints JSON.

From the checkout: ``.venv/bin/python -m benchmarks.playground [--screenshot docs/images/playground.png]``.

- First token: from the moment a rank's engine has produced it (its process's clock) to the task after the frame that
  shows it (the page's clock; one machine, so one clock). In between: Ray, the replica, Serve's proxy, the browser.
- Frames: a stream of a minute, the service at the lowest priority: a user's browser has cores of its own. Gaps between
  animation frames as the page sees them, tasks over 50 ms, and what the browser's own trace says of its frames
  (``frames.py``).
- Control: a page that only shows a counter, while the same stream is read by another process. What it drops is dropped
  for want of a core, as far as priorities leave any: the engine, Ray and Chromium have the same ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import psutil

from benchmarks.frames import BEGIN, END, FRAME_MS, end_trace, mark, start_trace
from meteora_dist.engine.request import GenerationRequest, TokenEvent
from meteora_dist.model.demo_model import demo_model_dir
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.local import running_service
from meteora_dist.serving.ranks import RankActor
from meteora_dist.serving.server import Server
from tests.support.browser import Browser, Page, browser

BANK = Path("examples/bank")
HTTP, GRPC = 8123, 9123
LOWEST = 19
SETTLING_S = 2
PROMPT = "Tell me a very long story."
STREAM = {"max_tokens": 4000, "temperature": 1, "ignore_eos": True, "stream": True, "routing": {"trace": "layers"}}
STATE = "document.querySelector('.pane').dataset.state"
OVER = f"['complete', 'cut', 'failed', 'stopped'].includes({STATE})"
WATCH = """(() => {
  const seen = window.seen = { gaps: [], long: [] };
  new PerformanceObserver(list => seen.long.push(...list.getEntries().map(entry => entry.duration)))
    .observe({ type: 'longtask' });
  let before = 0;
  const frame = now => {
    if (before) seen.gaps.push(now - before);
    before = now;
    if (!window.over) requestAnimationFrame(frame);
  };
  requestAnimationFrame(frame);
})()"""


class TimedRank(RankActor):
    """Writes down when its engine has produced the first token of each request."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """As of any rank."""
        first = True
        tokens = cast(AsyncGenerator[TokenEvent, None], super().generate(request))
        async with aclosing(tokens) as events:
            async for event in events:
                if first:
                    Path("/tmp/meteora-first-token").write_text(repr(time.time()))
                    first = False
                yield event


class TimedServer(Server):
    """A replica of such ranks."""

    member = TimedRank


def first_tokens(page: Page, url: str, times: int) -> list[float]:
    """Milliseconds from the engine to the screen."""
    delays = []
    for number in range(times):
        page.go(url)
        page.wait("document.querySelector('#status').dataset.state === 'ready'")
        page.type("#prompt", f"Question {number}: could a blue whale fit into a school bus?")
        page.type("#max-tokens", "8")
        page.click("#run")
        page.wait(OVER)
        seen = page.wait("performance.getEntriesByName('first-token').length && performance.timeOrigin + "
                         "performance.getEntriesByName('first-token')[0].startTime + "
                         "performance.getEntriesByName('first-token')[0].duration")  # fmt: skip
        delays.append(seen - 1000 * float(Path("/tmp/meteora-first-token").read_text()))
    return delays


def stand_back() -> None:
    """Gives all that this process has started, except Chromium, the lowest priority; Linux."""
    for process in psutil.Process().children(recursive=True):
        if "chrom" in process.name():
            continue
        # A session is scheduled as one, and has a priority of its own.
        with suppress(OSError):
            Path(f"/proc/{process.pid}/autogroup").write_text(str(LOWEST))
        for thread in process.threads():
            os.setpriority(os.PRIO_PROCESS, thread.id, LOWEST)


def frames(chromium: Browser, page: Page, url: str, seconds: float) -> dict[str, Any]:
    """A stream of ``seconds`` into one pane: what the page and the browser's trace say of it."""
    page.go(url)
    page.wait("document.querySelector('#status').dataset.state === 'ready'")
    page.type("#prompt", PROMPT)
    page.type("#max-tokens", str(STREAM["max_tokens"]))
    page.type("#temperature", str(STREAM["temperature"]))
    page.click("#ignore-eos")
    page.click("#run")
    page.wait(f"{STATE} === 'streaming' || {OVER}")
    assert page.eval(STATE) == "streaming", page.text(".pane .alert")
    found = watched(chromium, page, seconds)
    found["tokens"] = int(page.text(".stats .count"))
    assert page.eval(STATE) == "streaming"
    page.click("#stop")
    return found


def control(chromium: Browser, url: str, seconds: float) -> dict[str, Any]:
    """The same for a page that shows twelve numbers a second, and nothing else, while the service streams elsewhere."""
    page = chromium.open("data:text/html,<p>0</p>")
    with reader(url):
        page.eval("(setInterval(() => document.querySelector('p').textContent++, 1000 / 12), 1)")
        found = watched(chromium, page, seconds)
    page.close()
    return found


@contextmanager
def reader(url: str) -> Iterator[None]:
    """A process that reads the stream the page would read."""
    body = STREAM | {"model": "auto", "messages": [{"role": "user", "content": PROMPT}]}
    command = ["curl", "--silent", "--no-buffer", "--json", json.dumps(body), f"{url}v1/chat/completions"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline().startswith(b"data:")
    sink = subprocess.Popen(["cat"], stdin=process.stdout, stdout=subprocess.DEVNULL)
    process.stdout.close()
    try:
        yield
    finally:
        process.terminate()
        process.wait()
        sink.wait()


def watched(chromium: Browser, page: Page, seconds: float) -> dict[str, Any]:
    """What happens to a page's frames in so many seconds. Frames are asked for all the time, as by an animation."""
    start_trace(chromium)
    # A browser that has just begun to trace drops frames of any page.
    time.sleep(SETTLING_S)
    mark(page, BEGIN)
    page.eval(WATCH)
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        time.sleep(1)
        page.eval("1")
    seen = page.eval("(window.over = true, window.seen)")
    mark(page, END)
    time.sleep(1)
    trace = end_trace(chromium, page)
    gaps = sorted(seen["gaps"])
    return {
        "seconds": seconds,
        "frames": len(gaps),
        "gap_ms": {"median": statistics.median(gaps), "p99": gaps[int(0.99 * len(gaps))], "max": gaps[-1]},
        "gaps_over_2_frames": sum(gap > 2 * FRAME_MS for gap in gaps),
        "tasks_over_50_ms": len(seen["long"]),
        "trace": asdict(trace),
    }


def screenshot(page: Page, url: str, path: Path) -> None:
    """The page with an answer of several experts."""
    page.go(url)
    page.wait("document.querySelectorAll('.chip-button').length")
    page.resize(1280, 980)
    page.click(".chip-button")
    page.click("#run")
    page.wait(OVER)
    page.hover(".t[data-n='11']")
    page.screenshot(path)


def machine() -> str:
    """The processor, and how many of its cores there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return f"{next(line.split(': ')[1] for line in lines if line.startswith('model name'))}, {os.cpu_count()} cores"


def rounded(found: Any) -> Any:
    """Numbers with as many digits as mean something."""
    if isinstance(found, dict):
        return {name: rounded(value) for name, value in found.items()}
    if isinstance(found, list):
        return [rounded(value) for value in found]
    return round(found, 2) if isinstance(found, float) else found


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the stream")
    parser.add_argument("--control", type=float, default=30.0, help="and of the control")
    parser.add_argument("--times", type=int, default=10, help="how many first tokens")
    parser.add_argument("--screenshot", type=Path, help="where to put a picture of the page")
    options = parser.parse_args()
    config = ServiceConfig(model=demo_model_dir(), bank=BANK, access="open", max_model_len=4096)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    found: dict[str, Any] = {"commit": commit.stdout.strip(), "machine": machine()}
    with (
        tempfile.TemporaryDirectory() as folder,
        running_service(config, HTTP, GRPC, server=TimedServer) as endpoints,
        browser(Path(folder)) as chromium,
    ):
        url = f"{endpoints.http}/"
        page = chromium.open(url)
        delays = first_tokens(page, url, options.times)
        found["first_token_ms"] = {"median": statistics.median(delays), "max": max(delays), "all": delays}
        stand_back()
        if options.seconds:
            found["stream"] = frames(chromium, page, url, options.seconds)
        if options.control:
            found["control"] = control(chromium, url, options.control)
        if options.screenshot:
            screenshot(page, url, options.screenshot)
        found["console"] = page.complaints
        strangers = [request for request in page.requests if not request.startswith(url)]
        found["requests"] = {"all": len(page.requests), "to other hosts": strangers}
    print(json.dumps(rounded(found), indent=1))


if __name__ == "__main__":
    sys.exit(main())
