"""Counts how much every slot is used: what a rebalance of the placement is decided on.

Shapes: T tokens, N linears of a group, K expert slots a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SlotLoads:
    """How often the tokens of this rank's requests were routed to each slot, once for every linear.

    Ranks of a tp group see the same tokens and count the same; the load of the world is the sum over one rank of each
    group. Groups only hand their ids over, and a pass is counted at its end, at once.
    """

    def __init__(self) -> None:
        """Starts at zero."""
        self._seen: list[Tensor] = []
        # The empty slot is counted first, and left out of the answers.
        self._counts = torch.zeros(1, dtype=torch.long)

    def see(self, slots_TNK: Tensor) -> None:
        """Takes the slots of one group of linears in the pass under way; ``NO_EXPERT`` where unused."""
        self._seen.append(slots_TNK)

    def settle(self) -> None:
        """Counts the pass that has ended."""
        if not self._seen:
            return
        used = torch.cat([slots_TNK.flatten() for slots_TNK in self._seen]) + 1
        self._seen.clear()
        counts = torch.bincount(used, minlength=len(self._counts)).cpu()
        counts[: len(self._counts)] += self._counts
        # Replaced, not changed: another thread may be reading.
        self._counts = counts

    def counts(self, slots: int) -> tuple[int, ...]:
        """The counts of the first ``slots`` slots since the start; for any thread."""
        counts: list[int] = self._counts[1 : slots + 1].tolist()
        return (*counts, *[0] * (slots - len(counts)))

    def renumber(self, before: Sequence[str], after: Sequence[str]) -> None:
        """Between two passes: slots of the adapters ``before`` become those of ``after``; new ones start at zero."""
        known = dict(zip(before, self.counts(len(before)), strict=True))
        self._counts = torch.tensor([0, *(known.get(digest, 0) for digest in after)])
