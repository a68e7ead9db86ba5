"""The swap through shared memory: what it brings, whom it waits for, and where it is used."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from meteora_dist.moe import shared_swap
from meteora_dist.moe.shared_memory import Address, Segment
from meteora_dist.moe.shared_swap import SharedSwap, quickest_swap
from meteora_dist.moe.swap import GroupSwap
from tests.support.ranks import run_ranks

TIMEOUT = timedelta(seconds=30)
ROUNDS = 60
HALF_BYTES = 4096


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _tensors(rank: int, ranks: int, number: int) -> list[Tensor]:
    """Of several dtypes and odd sizes; every seventh time they do not fit into a half of 4 KiB."""
    generator = torch.Generator().manual_seed(1000 * number + rank)
    width = 2048 if number % 7 == 6 else 5
    floats = torch.randn(ranks, 1 + number % 3, width, generator=generator)
    return [floats, (100 * floats[..., :3]).int(), floats.bfloat16().transpose(1, 2)]


def _compare(rank: int, ranks: int) -> tuple[str, float]:
    rounds = [_tensors(rank, ranks, number) for number in range(ROUNDS)]
    with patch.object(shared_swap, "HALF_BYTES", HALF_BYTES):
        quick = quickest_swap(_world(), TIMEOUT)
        came = []
        for number, outgoing in enumerate(rounds):
            # One after the other comes late or reads late, so that each waits for each, and nobody for what it has.
            time.sleep(0.002 * (number % (2 * ranks) == 2 * rank))
            if number % 2:
                laid_out = quick.room(*((values.shape, values.dtype) for values in outgoing))
                for place, values in zip(laid_out, outgoing, strict=True):
                    place.copy_(values)
                outgoing = list(laid_out)
            incoming = quick.give(*outgoing)()
            time.sleep(0.002 * (number % (2 * ranks) == 2 * rank + 1))
            came.append([[part.clone() for part in parts] for parts in incoming])
        # A long wait sleeps.
        time.sleep(1.0 * (rank == 0))
        before = time.process_time()
        quick.give(torch.ones(ranks, 1))()
        waiting_s = time.process_time() - before
    plain = GroupSwap(_world())
    for outgoing, incoming in zip(rounds, came, strict=True):
        for parts, expected in zip(incoming, plain.give(*outgoing)(), strict=True):
            assert [part.dtype for part in parts] == [part.dtype for part in expected]
            assert all(map(torch.equal, parts, expected))
    return type(quick).__name__, waiting_s


@pytest.mark.parametrize("ranks", [2, 3])
def test_brings_what_the_process_group_brings(ranks: int) -> None:
    for name, waiting_s in run_ranks(ranks, _compare, ranks):
        assert name == "SharedSwap"
        assert waiting_s < 0.3


def _lose(rank: int, folder: Path) -> None:
    """Rank 1 is killed after one swap; rank 0 notes what it says of that, and after how long."""
    swap = quickest_swap(_world(), TIMEOUT)
    swap.give(torch.ones(2, 1))()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        swap.give(torch.ones(2, 1))()
    except dist.DistError as error:
        (folder / "error").write_text(f"{time.monotonic() - started} {error}")


def test_a_killed_rank_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^rank 1: died without a word$"):
        run_ranks(2, _lose, tmp_path)
    seconds, _, error = (tmp_path / "error").read_text().partition(" ")
    assert error == "rank 1 of the exchange is gone; rank 0 waited for it"
    assert float(seconds) < 5


def _wait_in_vain(rank: int) -> str:
    swap = quickest_swap(_world(), timedelta(seconds=1))
    assert isinstance(swap, SharedSwap)
    error = ""
    if rank == 0:
        try:
            swap.give(torch.ones(2, 1))()
        except dist.DistError as late:
            error = str(late)
    dist.barrier()
    return error


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever() -> None:
    error, _ = run_ranks(2, _wait_in_vain)
    assert error == "rank 1 of the exchange did not come within 1 s; rank 0 waited for it"


def _some_cannot(rank: int) -> list[str]:
    """What all use when nobody, rank 0, or rank 2 alone cannot share memory."""
    refuse = Mock(side_effect=OSError("another machine"))
    used = []
    for failing in (None, 0, 2):
        with patch.object(Segment, "create" if rank == 0 else "open", refuse) if rank == failing else nullcontext():
            used.append(type(quickest_swap(_world(), TIMEOUT)).__name__)
    return used


def test_all_use_the_process_group_when_one_cannot_share() -> None:
    assert run_ranks(3, _some_cannot) == [["SharedSwap", "GroupSwap", "GroupSwap"]] * 3


def test_another_process_under_the_same_numbers_is_not_taken_for_the_right_one() -> None:
    segment = Segment.create(4096)
    pid, fd, token = segment.address
    same = Segment.open(segment.address, 4096)
    segment.memory[:5] = b"words"
    assert same.memory[:5] == b"words"
    with pytest.raises(OSError, match="another file, of another process"):
        Segment.open(Address(pid, fd, token + 1), 4096)
