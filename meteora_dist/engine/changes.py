"""Changes of what the ranks hold: loaded beside what is in use, then put in force by all ranks between two passes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

from meteora_dist.errors import EngineUnavailable
from meteora_dist.moe.residency import Residency
from meteora_dist.moe.routed_model import Prepared, RoutedModel

_LOOK_EVERY_S = 0.5


class Changes:
    """One rank's view of the changes of its world, numbered from 1 in the order in which they are made.

    The world makes one at a time: every rank prepares it, which may fail and shows nowhere; then every rank is told to
    commit it, or every rank to discard it. A rank that is told to commit votes for the change before every step, and
    all switch before the same one, once all vote for it.
    """

    def __init__(self, routed: RoutedModel) -> None:
        """Starts with what ``routed`` holds, as change 0."""
        self._routed = routed
        self._prepared: dict[int, Prepared] = {}
        self._told = 0
        self._made = 0
        self._news = threading.Condition()

    def prepare(self, number: int, residency: Residency) -> None:
        """Loads what this rank lacks of ``residency``, while it serves on; for any thread.

        Raises:
            CheckpointError: A bank cannot be read, or does not fit; nothing has changed.
        """
        self._prepared = {number: self._routed.prepare(residency)}

    def discard(self, number: int) -> None:
        """Forgets a change that was prepared, if it was."""
        self._prepared.pop(number, None)

    def commit(self, number: int, wake: Callable[[], None], check: Callable[[], None]) -> None:
        """Waits until all ranks have switched to a prepared change; for any thread but the loop's.

        Args:
            number: Of the change.
            wake: Wakes the ranks, should they be asleep.
            check: Raises EngineUnavailable when the loop has ended.

        Raises:
            EngineUnavailable: The loop has ended, or the change was not prepared.
        """
        if number not in self._prepared and number > self._made:
            raise EngineUnavailable(f"change {number} of the experts is to be committed, but was not prepared")
        self._told = number
        wake()
        with self._news:
            while not self._news.wait_for(lambda: self._made >= number, _LOOK_EVERY_S):
                check()

    def vote(self, in_use: Callable[[], Collection[int]]) -> int:
        """The newest change this rank can switch to; for the loop, before a step.

        Args:
            in_use: Asked, when there is a change to vote for, for the generations of all requests under way.
        """
        prepared = self._prepared.get(self._told)
        if prepared is None or not prepared.holdings.banks.keys() >= set(in_use()):
            return self._made
        return self._told

    def make(self, number: int) -> None:
        """Switches to the change all ranks have voted for, if it is a new one; for the loop, between two passes."""
        if number <= self._made:
            return
        self._routed.switch(self._prepared.pop(number))
        with self._news:
            self._made = number
            self._news.notify_all()
