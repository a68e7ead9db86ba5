"""The folder of a training run: begun once, gone on with as often as it takes, and only with the same options.

One process at a time works in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from meteora_dist.errors import TrainingError

RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
TRAINED_FILE = "trained.safetensors"
"""What the objective exports when training has ended."""

REPORT_ONLY = {"log_every", "checkpoint_every", "evaluate_every", "threads"}
"""Options of the loop on which the result does not depend."""


def claim(folder: Path, recipe: Mapping[str, Any]) -> BaseFileLock:
    """Begins a run in ``folder``, or goes on with the one that was begun there.

    Args:
        folder: Of the run; made if it is not there.
        recipe: All that the result depends on, as JSON can hold it.

    Returns:
        What keeps other processes out, for as long as somebody refers to it.

    Raises:
        TrainingError: The run there was begun with another recipe, which names what differs; another process works
            in it; or the folder cannot be used.
    """
    if folder.exists() and not folder.is_dir():
        raise TrainingError(f"{folder} is a file; a run needs a folder")
    path = folder / RUN_FILE
    if not path.exists() and folder.exists() and any(one.name != LOCK_FILE for one in folder.iterdir()):
        raise TrainingError(f"{folder} holds files, but no run; name a folder that is empty or not there yet")
    lock = _lock(folder)
    if path.exists():
        before = json.loads(path.read_text())
        now = json.loads(json.dumps(recipe))
        if differing := sorted(_differing(before, now, "")):
            raise TrainingError(
                f"{folder} holds a run that was begun with other settings ({', '.join(differing[:8])}); "
                "give them as they were to go on with it, or name another folder"
            )
        return lock
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(recipe, indent=1) + "\n")
    partial.rename(path)
    return lock


def _lock(folder: Path) -> BaseFileLock:
    # One for all who ask in this process: a run may be gone on with where it was begun.
    lock = FileLock(folder / LOCK_FILE, blocking=False, is_singleton=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise TrainingError(f"another process trains in {folder}; wait for its end, or name another folder") from None
    except OSError as cause:
        raise TrainingError(f"{folder} cannot hold a run: {cause.strerror}") from cause
    return lock


def _differing(before: Any, now: Any, prefix: str) -> set[str]:
    """Paths of what differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = before.keys() | now.keys()
        return {path for key in keys for path in _differing(before.get(key), now.get(key), f"{prefix}{key}.")}
    return set() if before == now else {prefix.rstrip(".")}
