"""Votes, and sleep: nobody spins while there is no work, and no wake-up is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch.distributed as dist

from meteora_cluster.member import free_port
from meteora_dist.bank import Bank
from meteora_dist.engine.config import EngineConfig
from meteora_dist.engine.lockstep import Alone, Vote, join
from meteora_dist.engine.rank import RankEngine
from meteora_dist.engine.request import GenerationRequest
from tests.support.ranks import run_ranks

ROUNDS = 20


def _three_ranks(rank: int, rendezvous: str) -> tuple[Vote, int]:
    lockstep = join(rank, 3, rendezvous)
    vote = lockstep.agree(Vote(working=rank == 2, slots=rank, staying=rank == 0, change=5 + rank))
    # Woken while asleep, by another rank each time.
    for number in range(ROUNDS):
        if number % 3 == rank:
            threading.Timer(0.002 * (number % 4), lockstep.wake).start()
        lockstep.sleep()
        lockstep.agree(vote)
    # Woken before anybody sleeps, twice over: the sleep does not begin, and the one after it is not cut short.
    if rank == 1:
        lockstep.wake()
        lockstep.wake()
    lockstep.agree(vote)
    lockstep.sleep()
    lockstep.agree(vote)
    started = time.monotonic()
    if rank == 0:
        threading.Timer(0.3, lockstep.wake).start()
    lockstep.sleep()
    slept_ms = int(1000 * (time.monotonic() - started))
    lockstep.agree(vote)
    dist.destroy_process_group()
    return vote, slept_ms


def test_three_ranks_vote_and_sleep_together() -> None:
    outcomes = run_ranks(3, _three_ranks, f"tcp://127.0.0.1:{free_port()}", join=False)
    for vote, slept_ms in outcomes:
        assert vote == Vote(working=True, slots=2, staying=True, change=5)
        assert slept_ms > 100


def test_alone_a_wake_up_before_the_sleep_counts() -> None:
    lockstep = Alone()
    lockstep.wake()
    lockstep.sleep()
    assert lockstep.agree(Vote(False, 0, False)) == Vote(False, 0, False)


def test_several_ranks_must_know_where_to_meet() -> None:
    with pytest.raises(ValueError, match="a world of 2 ranks needs a rendezvous"):
        join(0, 2, None)


def test_an_idle_engine_takes_no_steps(tiny_base: Path, tiny_bank: Bank) -> None:
    with patch.object(Alone, "agree", autospec=True, side_effect=lambda self, vote: vote) as agree:
        engine = RankEngine(EngineConfig(model=tiny_base, bank=tiny_bank.path, kv_cache_tokens=4096))
        for number in range(2):
            asyncio.run(_answer(engine, GenerationRequest(f"r{number}", (1, 2, 3), 4, ignore_eos=True)))
            time.sleep(0.3)
            steps = agree.call_count
            time.sleep(0.3)
            assert agree.call_count == steps
            assert engine.stalled_s() is None
        engine.stop()


async def _answer(engine: RankEngine, request: GenerationRequest) -> None:
    assert len([event async for event in engine.generate(request)]) == request.max_tokens
