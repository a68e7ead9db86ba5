"""Runs what a page shows, as a reader would: block by block, in one folder, with the checkout's environment."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from meteora_cluster.member import free_port
from meteora_dist.serving.local import Endpoints

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str = "bash") -> list[str]:
    """The code blocks of a page of the repository, without the indentation of a list around them."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def block(page: str, *words: str) -> str:
    """The one block that has all of these words."""
    (found,) = (block for block in blocks(page) if all(word in block for word in words))
    return found


def environment() -> dict[str, str]:
    """This process's, with the commands of its Python first."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "COLUMNS": "200"}


def run(commands: str, folder: Path, endpoints: Endpoints | None = None) -> str:
    """What bash prints; it must not fail. Addresses of the page become those of ``endpoints``."""
    if endpoints is not None:
        moved = commands.replace("http://127.0.0.1:8000", endpoints.http).replace("127.0.0.1:9000", endpoints.grpc)
        assert moved != commands, commands
        commands = moved
    words = ["bash", "-euo", "pipefail", "-c", commands]
    done = subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextmanager
def serving(command: str, folder: Path, more: str = "") -> Iterator[Endpoints]:
    """What a page's ``meteora serve`` starts, on ports that are free, until the block ends."""
    http, grpc = free_port(), free_port()
    words = ["bash", "-c", f"exec {command.strip()} --http-port {http} --grpc-port {grpc} {more}"]
    process = subprocess.Popen(
        words, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready"):
                break
        else:
            raise AssertionError("".join(lines))
        yield Endpoints(f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}")
    finally:
        # Ctrl-C reaches no process that was started in the background; a service manager's signal does.
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
