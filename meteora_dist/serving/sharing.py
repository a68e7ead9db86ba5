"""One replica's part in the bank that all replicas share: it says what it uses, and follows what others make."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from meteora_dist.bank import Bank
from meteora_dist.errors import MeteoraError
from meteora_dist.observability import metrics
from meteora_dist.observability.metrics import Recorder
from meteora_dist.serving.generations import Generations
from meteora_dist.serving.replicas import Replicas, ReplicaState

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_LOOKS = 30
"""Between two tries to load a generation that cannot be loaded: it may be large."""


class Follower(Protocol):
    """Whoever serves the bank."""

    @property
    def serving(self) -> int:
        """The generation that new requests use."""

    @property
    def needed(self) -> tuple[int, ...]:
        """Generations whose files are in use."""

    async def follow(self) -> None:
        """Serves the newest generation; raises MeteoraError when it cannot."""

    async def rebalance_here(self) -> int:
        """Rebalances these ranks alone; raises MeteoraError when it cannot."""


class Sharing:
    """Looks into the shared folder every so often, for as long as the replica lives.

    Until the folder is there, nothing is shared: it is made with the first change.
    """

    def __init__(self, generations: Generations, poll_s: float, recorder: Recorder) -> None:
        """Only takes note.

        Args:
            generations: The shared folder.
            poll_s: Seconds between two looks.
            recorder: Where failures are counted.
        """
        self.generations = generations
        self._poll_s = poll_s
        self._recorder = recorder
        self._replicas = Replicas(generations.folder)
        self._others: tuple[ReplicaState, ...] = ()
        self._follower: Follower | None = None
        self._claimed = 0
        self._published = 0
        self._beat = 0
        self._complaint = ""
        self._called = False
        self._failures = 0
        self._again = 0.0
        self._following: asyncio.Task[None] | None = None
        self._going: asyncio.Task[None] | None = None

    @property
    def states(self) -> tuple[ReplicaState, ...]:
        """The replicas, this one first: it as it is now, the others as they were at the last look."""
        return (self._state(), *self._others)

    @property
    def published(self) -> int:
        """The newest generation of all replicas, as of the last look; 0 for the configured bank's."""
        return self._published

    async def join(self) -> Bank:
        """Begins to take part, and opens the bank to serve.

        Raises:
            BankError: It is damaged or does not follow from the configured bank, or the folder cannot be written.
            AdapterError: An expert of it is damaged.
        """
        await asyncio.to_thread(self._claim)
        # Opening reads every byte: the others must hear of this replica meanwhile.
        self._going = asyncio.ensure_future(self._go())
        bank = await asyncio.to_thread(self.generations.open, self._claimed)
        self._claimed = bank.manifest.generation
        return bank

    def serve(self, follower: Follower) -> None:
        """From now on what others do comes to ``follower``."""
        self._follower = follower

    def stop(self) -> None:
        """Ends the looks; others will count this replica as gone."""
        for task in (self._going, self._following):
            if task is not None:
                task.cancel()

    async def look(self) -> None:
        """One look: says how this replica is, and begins to follow where others are ahead."""
        try:
            called = await asyncio.to_thread(self._look, self._state())
        except (MeteoraError, OSError) as error:
            self._recorder.add(metrics.BANK_FOLLOW_FAILURES, 1)
            # Once for each cause, not once a second.
            if str(error) != self._complaint:
                logger.error("the folder of generations cannot be used: %s", error)
            self._complaint = str(error)
            return
        self._complaint, self._called = "", self._called or called
        if self._follower is not None and (self._following is None or self._following.done()):
            self._following = asyncio.ensure_future(self._follow(self._follower))

    def _claim(self) -> None:
        """Says which generation this replica is about to read, so that nobody removes it; then it is the newest."""
        self.generations.rebalance_called()
        while True:
            self._claimed = self.generations.newest()
            if self.generations.folder.is_dir():
                self._tell(self._state())
            if self.generations.newest() == self._claimed:
                return

    def _state(self) -> ReplicaState:
        me, beat = self.generations.replica, self._beat
        if self._follower is None:
            return ReplicaState(
                replica=me, beat=beat, generation=self._claimed, live=(self._claimed,), state="starting"
            )
        generation, needed = self._follower.serving, self._follower.needed
        behind = self._failures > 0 and self._published > generation
        return ReplicaState(
            replica=me, beat=beat, generation=generation, live=needed, state="behind" if behind else "serving"
        )

    def _tell(self, state: ReplicaState) -> None:
        self._beat += 1
        self._replicas.tell(state.model_copy(update={"beat": self._beat}))

    def _look(self, state: ReplicaState) -> bool:
        """Whether a rebalance was called for."""
        if not self.generations.folder.is_dir():
            return False
        self._tell(state)
        self._others = self._replicas.others(state.replica)
        self._published = self.generations.newest()
        self.generations.tidy((state, *self._others))
        # Last: a call that is seen is carried out.
        return self.generations.rebalance_called()

    async def _follow(self, follower: Follower) -> None:
        """Does what others have made due, if anything is, and not too soon after it has failed."""
        clock = asyncio.get_running_loop().time
        behind = self._published > follower.serving
        if not (behind or self._called) or clock() < self._again:
            return
        try:
            if behind:
                await follower.follow()
            else:
                await follower.rebalance_here()
                self._called = False
            self._failures = 0
        except Exception as error:
            self._recorder.add(metrics.BANK_FOLLOW_FAILURES, 1)
            self._failures += 1
            pause_s = min(2**self._failures, _LONGEST_PAUSE_LOOKS) * self._poll_s
            self._again = clock() + pause_s
            what = f"load generation {self._published} of the bank" if behind else "rebalance, as another replica has"
            logger.error("cannot %s; tried again in %g s: %s", what, pause_s, error)

    async def _go(self) -> None:
        while True:
            try:
                await self.look()
            except Exception:
                logger.exception("a look into the folder of generations has failed")
            await asyncio.sleep(self._poll_s)
