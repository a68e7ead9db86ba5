"""Waiting for calls on several ranks at once, and telling what went wrong in one line a rank."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayActorError, RayTaskError

from meteora_cluster.errors import RankFailed, RankTimeout

LAST_WORDS_S = 2.0
"""How long the other ranks may still report after the first failure: the first to fail is often not the cause."""


def calls(refs: Sequence[Any]) -> dict[asyncio.Task[Any], int]:
    """One task a Ray object reference, with its rank: the position in ``refs``."""
    return {asyncio.ensure_future(value(ref)): rank for rank, ref in enumerate(refs)}


async def all_of(refs: Sequence[Any], doing: str, timeout_s: float) -> list[Any]:
    """Waits for one call on every rank.

    Args:
        refs: The call's object reference, one a rank.
        doing: What the ranks do, for the error.
        timeout_s: Seconds to wait.

    Returns:
        The results, in rank order.

    Raises:
        RankFailed: At least one rank raised or died.
        RankTimeout: Some ranks did not answer in time.
    """
    tasks = calls(refs)
    try:
        done, pending = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
        if pending and any(task.exception() for task in done):
            done, pending = await asyncio.wait(tasks, timeout=LAST_WORDS_S)
    finally:
        for task in tasks:
            task.cancel()
    reasons = {tasks[task]: reason_of(error) for task in done if (error := task.exception()) is not None}
    if reasons:
        raise RankFailed(doing, reasons)
    if pending:
        late = ", ".join(str(rank) for rank in sorted(tasks[task] for task in pending))
        raise RankTimeout(f"{doing}: no answer from rank {late} within {timeout_s:.0f} s")
    return [task.result() for task in sorted(tasks, key=tasks.__getitem__)]


def reason_of(error: BaseException) -> str:
    """What a failed call says in one line: the rank's own message where it raised, how it ended where it died."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return f"{type(cause).__name__}: {cause}".strip() if isinstance(cause, BaseException) else str(cause)
    if isinstance(error, ActorUnschedulableError):
        return f"it could not be placed: {error}"
    if isinstance(error, ActorDiedError | RayActorError):
        return "its process ended"
    return f"{type(error).__name__}: {error}"


async def value(ref: Any) -> Any:
    """What a Ray object reference stands for, as a coroutine that can be cancelled."""
    return await ref
