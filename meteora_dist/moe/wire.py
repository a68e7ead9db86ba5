"""Counts what a rank hands to collectives for other ranks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar, get_args

ExchangeKind = Literal["dispatch", "combine", "rank_space", "gate_logits", "sizes"]
R = TypeVar("R")
EXCHANGE_KINDS: tuple[ExchangeKind, ...] = get_args(ExchangeKind)


class Wire:
    """Bytes and rows this rank has handed over since it was made, by kind of exchange, and the time that took.

    What stays on the rank does not count, nor does what the base model exchanges by itself. ``dispatch`` are token
    rows with ids and weights on their way to experts, ``combine`` their deltas on the way back, ``rank_space`` and
    ``gate_logits`` what a tp group adds up, counted once however many ranks take part, and ``sizes`` how many rows
    each rank is about to receive. Time includes waiting for the other ranks; on a GPU it is only that of the calls,
    which do not wait.
    """

    def __init__(self) -> None:
        """Starts at zero."""
        self._bytes: Counter[ExchangeKind] = Counter()
        self._rows: Counter[ExchangeKind] = Counter()
        self._seconds: dict[ExchangeKind, float] = dict.fromkeys(EXCHANGE_KINDS, 0.0)

    @contextmanager
    def count(self, kind: ExchangeKind, rows: int, nbytes: int) -> Iterator[None]:
        """Counts the exchange inside, of ``rows`` rows that take ``nbytes`` together."""
        started = time.perf_counter()
        yield
        self._seconds[kind] += time.perf_counter() - started
        self._bytes[kind] += nbytes
        self._rows[kind] += rows

    def timed(self, kind: ExchangeKind, end: Callable[[], R]) -> Callable[[], R]:
        """``end``, which ends an exchange that was counted when it began; its time counts too."""

        def end_timed() -> R:
            started = time.perf_counter()
            ended = end()
            self._seconds[kind] += time.perf_counter() - started
            return ended

        return end_timed

    @property
    def seconds(self) -> float:
        """This rank's time in all exchanges so far."""
        return sum(self._seconds.values())

    def seconds_in(self, kind: ExchangeKind) -> float:
        """This rank's time in exchanges of one kind so far."""
        return self._seconds[kind]

    def bytes(self, kind: ExchangeKind) -> int:
        """Bytes handed over so far."""
        return self._bytes[kind]

    def rows(self, kind: ExchangeKind) -> int:
        """Rows handed over so far."""
        return self._rows[kind]
