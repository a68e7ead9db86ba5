"""Runs a function on several ranks, each a process of its own, and brings back every result or every traceback."""

from __future__ import annotations

import multiprocessing
import pickle
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

from meteora_cluster.member import free_port

TIMEOUT_S = 120
PRELOAD = ["meteora_dist.engine.rank", "tests.support.tiny"]
"""What every rank imports; one process does it for all ranks of a test run, and they are forked from it."""


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any, join: bool = True) -> list[Any]:
    """Calls ``function(rank, *arguments)`` in a process for each rank, and returns the results in rank order.

    With ``join`` the ranks are members of one gloo world already; without, the function joins one itself.

    Raises:
        RuntimeError: With the traceback of every rank that failed, not just the first to die.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_run, args=(rank, world if join else 0, Path(folder), function, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT_S)
        stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        outcomes = [_outcome(Path(folder), rank, rank in stuck) for rank in range(world)]
    errors = [outcome for ok, outcome in outcomes if not ok]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [outcome for _, outcome in outcomes]


def meet(folder: Path, name: str, rank: int, world: int) -> None:
    """Returns once every rank has called it, without a collective: an engine's loop has those to itself."""
    (folder / f"{name}-{rank}").touch()
    deadline = time.monotonic() + TIMEOUT_S
    while len(list(folder.glob(f"{name}-*"))) < world:
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {rank} waited {TIMEOUT_S} s for the others at {name}")
        time.sleep(0.01)


def rendezvous(folder: Path, name: str, rank: int) -> str:
    """Where the ranks meet: rank 0 picks a free port at the last moment, and the others read which."""
    place, partial = folder / name, folder / f"{name}.partial"
    if rank == 0:
        partial.write_text(f"tcp://127.0.0.1:{free_port()}")
        partial.rename(place)
    deadline = time.monotonic() + TIMEOUT_S
    while not place.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {rank} waited {TIMEOUT_S} s to hear where the ranks meet")
        time.sleep(0.01)
    return place.read_text()


def _run(rank: int, world: int, folder: Path, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        if world:
            where = f"file://{folder}/rendezvous"
            limit = timedelta(seconds=TIMEOUT_S)
            dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=limit)
        outcome = (True, function(rank, *arguments))
        if world:
            dist.destroy_process_group()
    except BaseException:
        outcome = (False, f"rank {rank}:\n{traceback.format_exc()}")
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(outcome))


def _outcome(folder: Path, rank: int, stuck: bool) -> tuple[bool, Any]:
    path = folder / f"{rank}.pickle"
    if path.exists():
        ok, value = pickle.loads(path.read_bytes())
        return ok, value
    return False, f"rank {rank}: " + (f"still running after {TIMEOUT_S} s" if stuck else "died without a word")
