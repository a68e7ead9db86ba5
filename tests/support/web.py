"""An HTTP application on a port of this machine, in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

_START_S = 20.0


@contextmanager
def served(api: FastAPI, prefix: str = "") -> Iterator[str]:
    """Serves ``api`` below ``prefix``; yields its base URL, without a slash at its end."""

    async def below(scope: Scope, receive: Receive, send: Send) -> None:
        # As Serve says it: the path stays whole, and its part that is the prefix is named.
        await api({**scope, "root_path": prefix}, receive, send)

    config = uvicorn.Config(below, port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + _START_S
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}{prefix}"
    finally:
        server.should_exit = True
        thread.join(_START_S)
