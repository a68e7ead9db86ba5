"""A Ray of our own on this machine, for as long as a block runs."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator
from importlib import import_module
from math import ceil
from pathlib import Path
from typing import Any

import ray

_EXIT_S = 15.0
"""Seconds Ray's processes get to end on their own before they are killed."""


@contextlib.contextmanager
def local_ray(*, cpus: float, gpus: int = 0, temp_dir: Path | None = None) -> Iterator[None]:
    """Starts a Ray that only this process uses and leaves no process of it behind.

    Ray protects its ports with a token by default and would keep that in the user's home folder; here the token lives
    in the environment of this process and its children only.

    Args:
        cpus: Logical CPUs of the Ray node; it has at least the machine's.
        gpus: Logical GPUs; 0 leaves it to Ray to find them.
        temp_dir: Where Ray keeps sockets and logs; Ray's own default when None. Socket paths limit its length.

    Raises:
        RuntimeError: This process already has a Ray.
    """
    if ray.is_initialized():
        raise RuntimeError("this process is connected to a Ray already")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    before = _descendants()
    try:
        with _own_sigterm():
            ray.init(
                address="local",
                num_cpus=max(ceil(cpus), os.cpu_count() or 1),
                num_gpus=gpus or None,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
                _temp_dir=str(temp_dir) if temp_dir else None,
            )
        yield
    finally:
        ours = _descendants() - before
        ray.shutdown()
        _wait_gone(ours)


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Puts the caller's SIGTERM handler back: Ray installs one that aborts the process and leaves others running."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _psutil() -> Any:
    # Ray ships it and puts it on the path when it is imported.
    return import_module("psutil")


def _descendants() -> set[Any]:
    return set(_psutil().Process().children(recursive=True))


def _wait_gone(processes: set[Any]) -> None:
    psutil = _psutil()
    _, alive = psutil.wait_procs(processes, timeout=_EXIT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=_EXIT_S)
