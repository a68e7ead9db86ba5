"""One Chromium for all tests of the page, and services for it to look at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from meteora_dist.serving.http_api import create_api
from meteora_dist.serving.service import TextService
from tests.support.browser import NAMES, Browser, browser, find_chromium
from tests.support.web import served

Serve = Callable[..., str]


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A headless Chromium; tests are skipped where there is none,
    unless METEORA_NEEDS_CHROMIUM says that there must be one.
    """
    if find_chromium() is None:
        reason = f"there is no Chromium: none of {', '.join(NAMES)} is on the PATH"
        if os.environ.get("METEORA_NEEDS_CHROMIUM"):
            pytest.fail(reason)
        pytest.skip(reason)
    with browser(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves a service with the page until the test ends; its URL, with a slash at its end."""
    with ExitStack() as stack:

        def start(service: TextService, prefix: str = "") -> str:
            return stack.enter_context(served(create_api(service, playground=True), prefix)) + "/"

        yield start
