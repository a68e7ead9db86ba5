"""Stop texts: where an answer ends, and how much of it is safe to send before that is known."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Passes text through until a stop text appears in it, wherever the pieces it arrives in are cut.

    The stop text that is complete first ends the answer; it is never part of what comes out, nor is anything after it.

    Attributes:
        stopped: Whether a stop text has appeared.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Takes the next piece, and returns what can be no part of a stop text."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Returns what was held back, once it is known that no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
