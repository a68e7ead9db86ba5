"""A headless Chromium, driven over the DevTools protocol: what tests of the page need of a browser, and no more."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

Json = dict[str, Any]

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_START_S = 30.0
_WAIT_S = 20.0
_POLL_S = 0.02
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-port=0",
    # Tests run as root in containers, with little shared memory.
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
)
_KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def find_chromium() -> str | None:
    """Path of an installed Chromium."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Runs a Chromium with a profile of its own in ``folder``, until the block ends."""
    path = find_chromium()
    assert path is not None, "ask find_chromium first"
    arguments = [path, *_OPTIONS, f"--user-data-dir={folder}", "about:blank"]
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        with connect(_address(process, folder / "DevToolsActivePort"), max_size=None) as socket:
            yield Browser(socket)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_WAIT_S)


def _address(process: subprocess.Popen[bytes], file: Path) -> str:
    """Where it listens, once it says so."""
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"Chromium ended with {process.returncode}"
        lines = file.read_text().splitlines() if file.is_file() else []
        if len(lines) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(_POLL_S)
    raise TimeoutError(f"Chromium did not start within {_START_S:.0f} s")


class Browser:
    """The connection, which all pages share.

    Attributes:
        pages: By their sessions.
        events: Those of no page, by method.
    """

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket
        self._asked = 0
        self.pages: dict[str, Page] = {}
        self.events: dict[str, list[Json]] = {}

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Json:
        """One command, and what it answers; events that come in between go to their pages."""
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": parameters}
        self._socket.send(json.dumps(message | ({} if session is None else {"sessionId": session})))
        while True:
            got = json.loads(self._socket.recv(timeout=_WAIT_S))
            if got.get("id") == self._asked:
                assert "error" not in got, f"{method}: {got['error']}"
                return got["result"]  # type: ignore[no-any-return]
            page = self.pages.get(got.get("sessionId", ""))
            if page is not None:
                page.heard(got["method"], got["params"])
            else:
                self.events.setdefault(got["method"], []).append(got["params"])

    def open(self, url: str, width: int = 1280, height: int = 900, reduced_motion: bool = False) -> Page:
        """A page in a context of its own, once it has loaded."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.resize(width, height)
        page.theme(False, reduced_motion)
        page.go(url)
        return page


@dataclass
class Page:
    """One page.

    Attributes:
        requests: Addresses it has asked for.
        complaints: Errors and warnings of its console, exceptions included.
        events: Other events, by method.
    """

    browser: Browser
    session: str
    target: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    events: dict[str, list[Json]] = field(default_factory=dict)

    def call(self, method: str, **parameters: Any) -> Json:
        return self.browser.call(method, self.session, **parameters)

    def heard(self, method: str, event: Json) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(event["exceptionDetails"]["exception"].get("description", "exception"))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning"):
            self.complaints.append(str([one.get("value") for one in event["args"]]))
        elif method == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")
        else:
            self.events.setdefault(method, []).append(event)

    def go(self, url: str) -> None:
        """Loads another document, and waits until it has loaded."""
        self.eval("window.left = true")
        self.call("Page.navigate", url=url)
        self.wait("!window.left && document.readyState === 'complete'")

    def eval(self, expression: str) -> Any:
        """The value of a JavaScript expression, once it is no promise any more."""
        got = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def wait(self, condition: str, timeout_s: float = _WAIT_S) -> Any:
        """Waits until a JavaScript expression is true; returns its value."""
        deadline = time.monotonic() + timeout_s
        while not (value := self.eval(condition)):
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {condition}"
            time.sleep(_POLL_S)
        return value

    def on(self, selector: str, expression: str) -> Any:
        """The value of a JavaScript expression about ``it``, the first element that the selector finds."""
        return self.eval(f"(it => {expression})(document.querySelector({json.dumps(selector)}))")

    def text(self, selector: str) -> str:
        return str(self.on(selector, "it.textContent"))

    def click(self, selector: str) -> None:
        """A mouse click on the middle of an element, where a reader would make it."""
        self.on(selector, "it.scrollIntoView({block: 'center'})")
        x, y = self.middle(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def hover(self, selector: str) -> None:
        x, y = self.middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def middle(self, selector: str) -> tuple[float, float]:
        # The first of its boxes: a token may go over the end of a line.
        x, y, width, height = self.on(
            selector, "(box => [box.x, box.y, box.width, box.height])(it.getClientRects()[0])"
        )
        return x + width / 2, y + height / 2

    def type(self, selector: str, text: str) -> None:
        """Replaces what a field holds, as if it had been typed."""
        self.on(selector, "{ it.focus(); it.select(); }")
        self.call("Input.insertText", text=text)

    def choose(self, selector: str, value: str) -> None:
        """Picks an option of a list."""
        change = "new Event('change', {bubbles: true})"
        self.on(selector, f"{{ it.value = {json.dumps(value)}; it.dispatchEvent({change}); }}")

    def press(self, key: str, modifiers: int = 0) -> None:
        """One key; ``modifiers`` 2 is Control, 8 Shift."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key], "modifiers": modifiers}
        typed = {"text": "\r"} if key == "Enter" and not modifiers else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if typed else "rawKeyDown", **common, **typed)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def theme(self, dark: bool, reduced_motion: bool = False) -> None:
        """What the reader's system prefers."""
        features = [
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else "no-preference"},
        ]
        self.call("Emulation.setEmulatedMedia", features=features)

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def screenshot(self, path: Path) -> None:
        """The whole page, as PNG."""
        got = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(got["data"]))

    def close(self) -> None:
        self.browser.call("Target.closeTarget", targetId=self.target)
