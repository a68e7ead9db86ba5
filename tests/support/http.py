"""An HTTP application that answers on this machine while a test asks it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from meteora_cluster.member import free_port


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The application on a port of this machine, in a thread; the base URL of its OpenAI API."""
    port = free_port("127.0.0.1")
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = server.force_exit = True
        thread.join()
