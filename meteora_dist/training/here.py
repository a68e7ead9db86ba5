"""The one worker of a run as this process: without Ray, and without a second life."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from meteora_dist.training.keeper import FolderKeeper
from meteora_dist.training.loop import Keeper

Work = Callable[[Keeper], None]
"""What a worker does, in the default process group of all. It is pickled: a function of a module, or a partial."""


def run_here(work: Work, folder: Path) -> None:
    """Does the work in this process; metrics and checkpoints go to ``folder``."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it
    dist.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        work(FolderKeeper(folder))
    finally:
        dist.destroy_process_group()
