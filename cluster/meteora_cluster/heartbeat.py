"""Noticing a rank that neither works nor dies: it is asked how it is, again and again, and must answer in time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from meteora_cluster.waiting import reason_of, value

_SLICES = 5
"""A deadline is waited for in slices, so that a pause of the asking process itself uses up one of them, not all."""


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """How closely ranks are watched. A stopped process is noticed within ``every_s + answer_s``.

    Attributes:
        every_s: Seconds between an answer and the next question.
        answer_s: Seconds a rank gets to answer.
        stall_s: Seconds a rank that has work may go without progress.
    """

    every_s: float = 1.0
    answer_s: float = 5.0
    stall_s: float = 120.0


async def failing(actor: Any, heartbeat: Heartbeat) -> str:
    """Asks a rank for as long as it answers and makes progress; returns what is wrong with it once it does not."""
    while True:
        question = asyncio.ensure_future(value(actor.beat.remote()))
        try:
            if not await _answered(question, heartbeat.answer_s):
                return f"it did not answer within {heartbeat.answer_s:g} s"
            stalled_s = question.result()
        except Exception as error:
            return reason_of(error)
        finally:
            question.cancel()
        if stalled_s is not None and stalled_s > heartbeat.stall_s:
            return f"it has work, but made no progress for {stalled_s:.0f} s"
        await asyncio.sleep(heartbeat.every_s)


async def _answered(question: asyncio.Task[float | None], answer_s: float) -> bool:
    for _ in range(_SLICES):
        done, _ = await asyncio.wait([question], timeout=answer_s / _SLICES)
        if done:
            return True
    return False
