"""A rank on standby: what it does ahead of its start, and how much of a busy core it takes for that."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from pathlib import Path
from unittest.mock import patch

from meteora_dist.bank import Bank
from meteora_dist.moe.residency import Residency
from meteora_dist.serving.config import ServiceConfig
from meteora_dist.serving.ranks import RankActor


def _may_speed_up() -> bool:
    """Whether a thread that was slowed down may be sped up again: not everybody has the right to."""
    allowed = []

    def slow_down_and_speed_up() -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, 1)
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, thread, 0)
        allowed.append(os.getpriority(os.PRIO_PROCESS, thread) == 0)

    thread = threading.Thread(target=slow_down_and_speed_up)
    thread.start()
    thread.join()
    return allowed[0]


async def test_a_rank_on_standby_hurries_once_it_is_wanted(tmp_path: Path, tiny_bank: Bank) -> None:
    wanted = 0 if _may_speed_up() else 10
    threads: list[int] = []
    importing, imported = threading.Event(), threading.Event()

    def slow_import(_: str) -> None:
        threads.append(threading.get_native_id())
        importing.set()
        assert imported.wait(10)

    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threads[0])

    def load(*_: object) -> None:
        assert nice() == wanted
        imported.set()

    residency = Residency.of(tiny_bank, 1)
    rank = RankActor(ServiceConfig(model=tmp_path, bank=tmp_path), 0, residency)
    with (
        patch("meteora_dist.serving.ranks.import_module", slow_import),
        patch("meteora_dist.serving.ranks._load", load),
    ):
        standing_by = asyncio.ensure_future(rank.stand_by())
        assert await asyncio.to_thread(importing.wait, 10)
        assert nice() == 10
        await rank.assign(ServiceConfig(model=tmp_path, bank=tmp_path), 0, residency)
        await rank.start("127.0.0.1:1")
        await asyncio.wait_for(standing_by, 10)
    assert imported.is_set()
    assert os.getpriority(os.PRIO_PROCESS, 0) == 0
