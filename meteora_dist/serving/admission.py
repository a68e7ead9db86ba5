"""Which request is next when there are more than the engine takes: bounded waiting, fair between callers."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from meteora_dist.errors import InvalidRequest, Overloaded

State = Literal["waiting", "live", "refused", "over"]


@dataclass(slots=True, eq=False)
class Ticket:
    """One request's claim to places in the engine.

    Attributes:
        key: Whose it is.
        cost: Most tokens it may come to.
        places: Generations it runs at once.
        decided: Called once, when the ticket becomes live or is refused.
        spent: Tokens it has come to; what is less than ``cost`` when it ends is given back to its caller.
        state: Where it stands.
    """

    key: str
    cost: int
    places: int
    decided: Callable[[], None]
    spent: int
    state: State = "waiting"


class FairQueue:
    """Grants places so that callers who want more than there is get equal shares of the engine's tokens.

    Every caller has an account of the tokens its requests have claimed. The next place goes to the first request of the
    caller whose account is lowest; it is charged what the request may come to, and refunded what it did not. Whoever
    comes back after a while starts at the account of the request that was granted last: rest earns no credit. Nobody
    overtakes a request whose turn it is, so that one which needs several places gets them.

    When all waiting places are taken, a newcomer takes the place of the newest request of the caller who has most
    waiting, if that is at least two more than the newcomer's own: a caller cannot fill the queue against the others.
    """

    def __init__(self, max_live: int, max_waiting: int) -> None:
        self.live = 0
        self._max_live = max_live
        self._max_waiting = max_waiting
        self._waiting: dict[str, deque[Ticket]] = {}
        self._accounts: dict[str, int] = {}
        self._granted_at = 0

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._waiting.values()))

    def check(self, key: str, places: int = 1) -> None:
        """Raises Overloaded or InvalidRequest when a request of this caller would be refused now."""
        if places > self._max_live:
            raise InvalidRequest(
                f"this call asks for {places} answers, but this service generates {self._max_live} at once", "n"
            )
        if self._waits(places) and self.waiting >= self._max_waiting and self._displaced_by(key) is None:
            raise Overloaded(
                f"{self.live} answers are under way and {self.waiting} requests wait, which is the most this service "
                "takes: try again"
            )

    def ask(self, key: str, cost: int, places: int, decided: Callable[[], None]) -> Ticket:
        """Asks for places.

        Args:
            key: Whose request it is.
            cost: Most tokens it may come to, prompt included.
            places: Generations it runs at once.
            decided: Called when it gets its places, or loses its place in the queue: at once, or later.

        Raises:
            Overloaded: There is no room, not even to wait.
            InvalidRequest: It needs more places than there are.
        """
        ticket = Ticket(key, cost, places, decided, spent=cost)
        self.check(key, places)
        if self._waits(places) and self.waiting >= self._max_waiting:
            self._refuse(self._displaced_by(key))
        if key not in self._waiting:
            self._accounts[key] = max(self._accounts.get(key, 0), self._granted_at)
        self._waiting.setdefault(key, deque()).append(ticket)
        self._grant()
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Ends a request, wherever it stands; those whose turn it is then get their places."""
        if ticket.state == "live":
            self.live -= ticket.places
            self._accounts[ticket.key] -= ticket.cost - ticket.spent
        elif ticket.state == "waiting":
            self._remove(ticket)
        ticket.state = "over"
        self._grant()

    def _waits(self, places: int) -> bool:
        return bool(self._waiting) or self.live + places > self._max_live

    def _displaced_by(self, key: str) -> Ticket | None:
        """The waiting request that makes room for a new one of this caller."""
        longest = max(self._waiting.values(), key=len, default=None)
        own = len(self._waiting.get(key, ()))
        return longest[-1] if longest is not None and len(longest) >= own + 2 else None

    def _refuse(self, ticket: Ticket | None) -> None:
        assert ticket is not None, "check has found one"
        self._remove(ticket)
        ticket.state = "refused"
        ticket.decided()

    def _remove(self, ticket: Ticket) -> None:
        queue = self._waiting[ticket.key]
        queue.remove(ticket)
        if not queue:
            del self._waiting[ticket.key]

    def _grant(self) -> None:
        while self._waiting:
            key = min(self._waiting, key=self._accounts.__getitem__)
            ticket = self._waiting[key][0]
            if self.live + ticket.places > self._max_live:
                return
            self._remove(ticket)
            self.live += ticket.places
            self._granted_at = max(self._granted_at, self._accounts[key])
            self._accounts[key] += ticket.cost
            ticket.state = "live"
            ticket.decided()


class Admission:
    """A :class:`FairQueue` that requests wait in; for one event loop."""

    def __init__(self, max_live: int, max_waiting: int) -> None:
        self._queue = FairQueue(max_live, max_waiting)

    @property
    def live(self) -> int:
        """Places in use."""
        return self._queue.live

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._queue.waiting

    def check(self, key: str, places: int = 1) -> None:
        """Raises Overloaded or InvalidRequest when a request of this caller would be refused now."""
        self._queue.check(key, places)

    @asynccontextmanager
    async def admitted(self, key: str, cost: int, places: int = 1) -> AsyncIterator[Ticket]:
        """Waits for places, and holds them for the length of the block; arguments as for :meth:`FairQueue.ask`.

        Yields:
            The ticket; whoever sets ``spent`` gets the rest of the cost back.

        Raises:
            Overloaded: There is no room, not even to wait; or another caller needed the place in the queue more.
        """
        decided = asyncio.Event()
        ticket = self._queue.ask(key, cost, places, decided.set)
        try:
            await decided.wait()
            if ticket.state == "refused":
                raise Overloaded("the queue is full, and others wait with fewer requests than you: try again")
            yield ticket
        finally:
            self._queue.leave(ticket)
