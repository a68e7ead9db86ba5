"""A process for every rank of a world."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from meteora_dist.engine.config import EngineConfig


@contextmanager
def rank_processes(config: EngineConfig, run: Callable[..., None], *arguments: Any) -> Iterator[list[Connection]]:
    """Calls ``run(config, rank, rendezvous, pipe, *arguments)`` in a process for each rank.

    A rank has to return when its pipe closes; one that has not after ten seconds is killed.

    Yields:
        The other ends of the pipes, in rank order. No process outlives the block.
    """
    context = multiprocessing.get_context("spawn")
    rendezvous = f"tcp://127.0.0.1:{_free_port()}" if config.mesh.size > 1 else None
    pairs = [context.Pipe() for _ in range(config.mesh.size)]
    processes = [
        context.Process(target=run, args=(config, rank, rendezvous, theirs, *arguments))
        for rank, (_, theirs) in enumerate(pairs)
    ]
    try:
        for process, (_, theirs) in zip(processes, pairs, strict=True):
            process.start()
            theirs.close()
        yield [ours for ours, _ in pairs]
    finally:
        for ours, _ in pairs:
            ours.close()
        for process in (process for process in processes if process.pid is not None):
            process.join(10)
            process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
